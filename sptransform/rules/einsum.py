"""Rules written like einsum."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from math import prod

from sptransform.diagnostics.errors import RuleError
from sptransform.rules.rule import Dims, OpCall, OpRule, Shape
from sptransform.sharding.sizes import Size, quotient


def _parse_tensor(text: str) -> list[tuple[str, ...]]:
    return [tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\S+", text)]


@dataclass(frozen=True)
class EinsumRule:
    """What :func:`rule` returns: called with an :class:`OpCall`, it gives the :class:`OpRule` for its shapes."""

    text: str
    reduce: str = ""
    replicated: str = ""
    linear: tuple[tuple[int, ...], ...] = ()
    heavy: bool = False

    def __post_init__(self) -> None:
        for name in ("reduce", "replicated"):
            if not isinstance(getattr(self, name), str):
                raise RuleError(f"{name} has factors separated by spaces, not {getattr(self, name)!r}")
        known = {f for part in self._patterns for tensor in part for dims in tensor for f in dims}
        summed, replicated = set(self.reduce.split()), set(self.replicated.split())
        if unknown := sorted((summed | replicated) - known):
            raise RuleError(f"{self.text!r} has no factor {', '.join(unknown)}; factors are separated by spaces")
        if both := sorted(summed & replicated):
            raise RuleError(f"{', '.join(both)} of {self.text!r} is in both reduce and replicated")
        self._check_linear()
        for part in self._patterns:
            for tensor in part:
                names = [f for factors in tensor for f in factors]
                if len(names) != len(set(names)):
                    raise RuleError(f"{self.text!r} names a factor twice in one tensor")

    def _check_linear(self) -> None:
        num_operands = len(self._patterns[0])
        sets = self.linear if isinstance(self.linear, tuple) else (self.linear,)
        for operands in sets:
            if not isinstance(operands, tuple) or any(i not in range(num_operands) for i in operands):
                raise RuleError(
                    f"linear has sets of operands, as ((0,), (1,)), of which {self.text!r} has {num_operands}; "
                    f"not {self.linear!r}"
                )

    @cached_property
    def _patterns(self) -> tuple[list[list[tuple[str, ...]]], ...]:
        """Factors of every dim, of the operands and of the results."""
        match = re.fullmatch(r"(.*)->(.*)", self.text)
        if match is None:
            raise RuleError(f"a rule has the form 'operands -> results', not {self.text!r}")
        if re.search(r"\([^)]*(\(|$)|^[^(]*\)", self.text):
            raise RuleError(f"the brackets of {self.text!r} do not match")
        return tuple([_parse_tensor(tensor) for tensor in part.split(",")] for part in match.groups())

    def __call__(self, call: OpCall) -> OpRule:
        of_operands, of_results = self._patterns
        if len(call.operand_shapes) > len(of_operands):
            raise RuleError(f"{call.target}: rule {self.text!r} has too few operands")
        if len(call.result_shapes) != len(of_results):
            found = f"{len(call.result_shapes)} results, rule {self.text!r} has {len(of_results)}"
            raise RuleError(f"{call.target} has {found}")
        operands = tuple(self._expand(p, s, call) for p, s in zip(of_operands, call.operand_shapes, strict=False))
        results = tuple(self._expand(p, s, call) for p, s in zip(of_results, call.result_shapes, strict=True))
        return OpRule(
            operands,
            results,
            self._sizes(operands, results, call),
            reduce=_with_leading(self.reduce, operands, results),
            replicated=_with_leading(self.replicated, operands, results),
            linear=tuple(frozenset(s) for s in self.linear if all(i < len(operands) for i in s)),
            heavy=self.heavy,
        )

    def _expand(self, pattern: list[tuple[str, ...]], shape: Shape, call: OpCall) -> Dims:
        """Factors of every dim of ``shape``; a dim of size 1 has none."""
        num_leading = len(shape) - (len(pattern) - (("...",) in pattern))
        if num_leading < 0 or (num_leading and ("...",) not in pattern):
            raise RuleError(f"{call.target}: rule {self.text!r} does not fit a tensor of shape {shape}")
        dims: list[tuple[str, ...]] = []
        for factors in pattern:
            if factors == ("...",):
                # numbered from the right, as broadcasting aligns
                dims.extend((f".{num_leading - i}",) for i in range(num_leading))
            else:
                dims.append(factors)
        return tuple(() if size == 1 else factors for factors, size in zip(dims, shape, strict=True))

    def _sizes(self, operands: tuple[Dims, ...], results: tuple[Dims, ...], call: OpCall) -> dict[str, Size]:
        """Extents of all factors: of those alone in a dim, then of those that are the only unknown one in a dim."""
        sizes: dict[str, Size] = {}
        shapes = (*call.operand_shapes, *call.result_shapes)
        unsolved = [
            (factors, size)
            for dims, shape in zip((*operands, *results), shapes, strict=True)
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
        present = [f for factors, _ in unsolved for f in factors]
        if unsized := sorted({f for f in present if f not in sizes}):
            raise RuleError(f"{call.target}: shapes do not say the size of {', '.join(unsized)} in {self.text!r}")
        return {f: sizes[f] for f in present}


def _with_leading(names: str, operands: tuple[Dims, ...], results: tuple[Dims, ...]) -> frozenset[str]:
    """The factors called so; ``...`` are all leading dimensions."""
    found = set(names.split())
    if "..." in found:
        found |= {f for dims in (*operands, *results) for factors in dims for f in factors if f.startswith(".")}
    return frozenset(found - {"..."})


def rule(
    text: str, *, reduce: str = "", replicated: str = "", linear: tuple[tuple[int, ...], ...] = (), heavy: bool = False
) -> EinsumRule:
    """Return a sharding rule from its einsum-like form.

    Tensors are separated by commas, dimensions by spaces; ``(b s)`` is one dimension of two factors; ``...`` stands
    for any number of leading dimensions, which broadcast. Trailing operands (an optional bias) may be absent.

        rule("... h, h -> ... h")                                   # element by element
        rule("... k, o k -> ... o", reduce="k", linear=((0,), (1,)))  # a linear
        rule("... h, h -> ... h", replicated="h")                   # a norm: every rank needs all of h

    Args:
        text: factors of the operands' and the results' dimensions.
        reduce: factors that the op sums over, separated by spaces: each rank's result is a term of a sum. ``...`` are
            all leading dimensions.
        replicated: factors that no rank can have a part of only, likewise.
        linear: sets of operands in which the op is linear, so that a term of a sum passes through: ``((0,), (1,))``, in
            each alone, as a product; ``((0, 1),)``, in both together, as a sum.
        heavy: the op is worth sharding even where every rank has its operands (a contraction).

    Raises:
        RuleError: ``text`` is not of this form, or names a factor twice in one tensor; ``reduce`` or ``replicated``
            name a factor that is not in it. When the rule is applied: it does not fit the shapes.
    """
    return EinsumRule(text, reduce, replicated, linear, heavy)
