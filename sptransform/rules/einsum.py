"""Rules written like einsum."""

from __future__ import annotations

import re
from math import prod

from sptransform.diagnostics.errors import RuleError
from sptransform.rules.rule import Dims, OpCall, OpRule, RuleFn, Shape
from sptransform.sharding.sizes import quotient


def _parse_tensor(text: str) -> list[tuple[str, ...]]:
    return [tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\S+", text)]


def rule(
    text: str, *, reduce: str = "", replicated: str = "", linear: tuple[tuple[int, ...], ...] = (), heavy: bool = False
) -> RuleFn:
    """Return a rule from its einsum-like form.

    Tensors are separated by commas, dimensions by spaces; ``(b s)`` is one dimension of two factors; ``...`` stands
    for any number of leading dimensions, which broadcast. Trailing operands (an optional bias) may be absent.
    ``reduce`` and ``replicated`` list factors separated by spaces.

    Raises:
        RuleError: when ``text`` is not of this form.
    """
    match = re.fullmatch(r"(.*)->(.*)", text)
    if match is None:
        raise RuleError(f"a rule has the form 'operands -> results', not {text!r}")
    patterns = [[_parse_tensor(tensor) for tensor in part.split(",")] for part in match.groups()]
    known = {f for part in patterns for tensor in part for dims in tensor for f in dims}
    unknown = set(f"{reduce} {replicated}".split()) - known
    if unknown:
        raise RuleError(f"{text!r} has no factor {', '.join(sorted(unknown))}")
    for part in patterns:
        for tensor in part:
            names = [f for factors in tensor for f in factors]
            if len(names) != len(set(names)):
                raise RuleError(f"{text!r} names a factor twice in one tensor")

    def apply(call: OpCall) -> OpRule:
        sizes: dict[str, int] = {}

        def expand(pattern: list[tuple[str, ...]], shape: Shape) -> Dims:
            num_leading = len(shape) - (len(pattern) - (("...",) in pattern))
            if num_leading < 0 or (num_leading and ("...",) not in pattern):
                raise RuleError(f"{call.target}: rule {text!r} does not fit a tensor of shape {shape}")
            dims: list[tuple[str, ...]] = []
            for factors in pattern:
                if factors == ("...",):
                    # numbered from the right, as broadcasting aligns
                    dims.extend((f".{num_leading - i}",) for i in range(num_leading))
                else:
                    dims.append(factors)
            return tuple(() if size == 1 else factors for factors, size in zip(dims, shape, strict=True))

        if len(call.operand_shapes) > len(patterns[0]):
            raise RuleError(f"{call.target}: rule {text!r} has too few operands")
        operands = tuple(expand(p, s) for p, s in zip(patterns[0], call.operand_shapes, strict=False))
        results = tuple(expand(p, s) for p, s in zip(patterns[1], call.result_shapes, strict=True))
        unsolved = [
            (factors, size)
            for tensors, shapes in ((operands, call.operand_shapes), (results, call.result_shapes))
            for dims, shape in zip(tensors, shapes, strict=True)
            for factors, size in zip(dims, shape, strict=True)
        ]
        for factors, size in unsolved:
            if len(factors) == 1:
                sizes.setdefault(factors[0], size)
        for factors, size in unsolved:
            missing = [f for f in factors if f not in sizes]
            if len(missing) == 1:
                # if the sizes do not fit, ``check`` reports it
                known_size = prod(sizes[f] for f in factors if f in sizes)
                sizes[missing[0]] = quotient(size, known_size) or 0
        present = [f for dims in (*operands, *results) for factors in dims for f in factors]
        unsized = {f for f in present if f not in sizes}
        if unsized:
            raise RuleError(f"{call.target}: shapes do not say the size of {', '.join(sorted(unsized))} in {text!r}")
        return OpRule(
            operands,
            results,
            {f: sizes[f] for f in present},
            reduce=frozenset(reduce.split()),
            replicated=frozenset(replicated.split()),
            linear=tuple(frozenset(s) for s in linear if all(i < len(operands) for i in s)),
            heavy=heavy,
        )

    return apply
