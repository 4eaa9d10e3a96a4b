"""Mask programs: an attention mask as a few pointwise ops, run on one block of queries and keys at a time.

A program is text, so that it can be an argument of an op. It is the same on all ranks::

    %3 = le.Tensor(%1, %0); %4 = logical_and(%3, %2)

``%0``, ``%1`` .. are operands: first ``rows``, which have a query dimension (the last but one), then ``columns``, which
have a key dimension (the last) or none, then ``tables`` [heads or 1, entries]. Dimensions broadcast. Every step is an
aten op; the overload is omitted if it is ``default``. The exception is ``lookup(table, index)``, the only reader of
tables. The last step is the mask, boolean (True is visible) or added to the scores. A program without steps is written
``%0``: the operand is the mask. Numbers and dtypes (``float32``) are written as they print.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import inf, nan
from typing import Any

import torch
from torch import Tensor

from sptransform.ops import lookup  # noqa: F401 - registers the op

aten = torch.ops.aten

LOOKUP = torch.ops.sptransform.lookup.default

# Pointwise, deterministic and independent of sizes and devices, but not tagged ``pointwise`` by torch
_ALSO_ELEMENTWISE = frozenset(
    {
        aten.__and__.Scalar,
        aten.__and__.Tensor,
        aten.__or__.Scalar,
        aten.__or__.Tensor,
        aten.absolute.default,
        aten.floor_divide.default,
        aten.greater.Scalar,
        aten.greater.Tensor,
        aten.greater_equal.Scalar,
        aten.greater_equal.Tensor,
        aten.less.Scalar,
        aten.less.Tensor,
        aten.less_equal.Scalar,
        aten.less_equal.Tensor,
        aten.masked_fill.Tensor,
        aten.multiply.Tensor,
        aten.negative.default,
        aten.not_equal.Scalar,
        aten.not_equal.Tensor,
        aten.rsub.Tensor,
        aten.subtract.Tensor,
        aten.to.dtype,
        aten.where.Scalar,
        aten.where.ScalarOther,
        aten.where.ScalarSelf,
    }
)

_NUMBERS = {"inf": inf, "nan": nan, "None": None, "True": True, "False": False}
_DTYPES = {str(x).removeprefix("torch."): x for x in vars(torch).values() if isinstance(x, torch.dtype)}


def is_elementwise(target: Any) -> bool:
    """Whether a program may hold the op: one result, each entry of which depends on the operands' entries there."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    if target in _ALSO_ELEMENTWISE:
        return True
    schema, tags = target._schema, target.tags
    if torch.Tag.pointwise not in tags or torch.Tag.nondeterministic_seeded in tags or schema.is_mutable:
        return False
    return len(schema.returns) == 1 and isinstance(schema.returns[0].type, torch.TensorType)


@dataclass(frozen=True)
class Ref:
    """The index-th value of a program: operands first, then the results of its steps."""

    index: int

    def __str__(self) -> str:
        return f"%{self.index}"


@dataclass(frozen=True)
class Step:
    """One op; its arguments are :class:`Ref`, numbers, strings and dtypes."""

    target: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        name = str(self.target).removeprefix("aten.").removeprefix("sptransform.").removesuffix(".default")
        arguments = [*map(_written, self.args), *(f"{key}={_written(x)}" for key, x in self.kwargs)]
        return f"{name}({', '.join(arguments)})"

    @property
    def refs(self) -> list[Ref]:
        """The values that it reads."""
        return [x for x in (*self.args, *(x for _, x in self.kwargs)) if isinstance(x, Ref)]

    def arguments(self, values: Sequence[Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """Its arguments, given the values of the program so far."""
        args = [values[x.index] if isinstance(x, Ref) else x for x in self.args]
        return args, {key: values[x.index] if isinstance(x, Ref) else x for key, x in self.kwargs}


@dataclass(frozen=True)
class MaskProgram:
    """``steps`` over operands; the first step's value is ``%num_operands``. ``str`` writes what :func:`parse` reads."""

    num_operands: int
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        if not self.steps:
            return "%0"
        return "; ".join(f"%{i} = {step}" for i, step in enumerate(self.steps, start=self.num_operands))

    def run(self, operands: Sequence[Tensor]) -> Tensor:
        """Compute the mask; the operands broadcast."""
        return self.values(operands, kept=())[-1]

    @cached_property
    def _read_last(self) -> list[list[int]]:
        """For every step, the values that it is the last to read."""
        last = {x.index: at for at, step in enumerate(self.steps) for x in step.refs}
        return [[index for index, at in last.items() if at == step] for step in range(len(self.steps))]

    def values(self, operands: Sequence[Tensor], kept: Collection[Ref] | None = None) -> list[Any]:
        """The operands and the result of every step; with ``kept``, None for others that steps have read last."""
        values: list[Any] = list(operands)
        for step, read_last in zip(self.steps, self._read_last, strict=True):
            args, kwargs = step.arguments(values)
            values.append(step.target(*args, **kwargs))
            del args, kwargs
            for index in read_last:
                if kept is not None and Ref(index) not in kept:
                    values[index] = None
        return values


def _written(x: Any) -> str:
    if isinstance(x, torch.dtype):
        return str(x).removeprefix("torch.")
    return str(x) if isinstance(x, Ref) else repr(x)


@lru_cache(maxsize=1024)
def parse(text: str) -> MaskProgram:
    """The program written as ``text``.

    Raises:
        ValueError: the text is not a program, or holds an op that is not pointwise.
    """
    try:
        statements = ast.parse(re.sub(r"%(\d+)", r"_\1", text)).body
        if len(statements) == 1 and isinstance(statements[0], ast.Expr):
            if _read(statements[0].value) != Ref(0):
                raise ValueError(text)
            return MaskProgram(1, ())
        results = [_read(statement.targets[0]).index for statement in statements]
        if not results or results != list(range(results[0], results[0] + len(results))):
            raise ValueError(text)
        return MaskProgram(results[0], tuple(_read_step(statement.value) for statement in statements))
    except (AttributeError, KeyError, SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"not a mask program: {text!r}") from error


def _read_step(call: ast.Call) -> Step:
    packet, overload = ast.unparse(call.func), "default"
    if isinstance(call.func, ast.Attribute):
        packet, overload = call.func.value.id, call.func.attr
    target = LOOKUP if packet == "lookup" else getattr(getattr(aten, packet), overload)
    if target is not LOOKUP and not is_elementwise(target):
        raise ValueError(f"{target} is not pointwise")
    return Step(target, tuple(map(_read, call.args)), tuple((x.arg, _read(x.value)) for x in call.keywords))


def _read(x: ast.expr) -> Any:
    if isinstance(x, ast.UnaryOp) and isinstance(x.op, ast.USub):
        return operator.neg(_read(x.operand))
    if isinstance(x, ast.Constant):
        return x.value
    if re.fullmatch(r"_\d+", x.id):
        return Ref(int(x.id[1:]))
    return _NUMBERS[x.id] if x.id in _NUMBERS else _DTYPES[x.id]


def block_mask(
    program: str,
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    q_start: int,
    q_stop: int,
    key_positions: Tensor | slice,
    tables: Sequence[Tensor] = (),
) -> Tensor:
    """The mask of queries ``q_start .. q_stop - 1`` and the keys at ``key_positions``.

    Args:
        program: the program's text.
        rows: operands ``[.., queries, 1 or keys]``; queries are this rank's, in the order in which it stores them.
        columns: operands ``[.., 1, 1 or keys]``, or with fewer dimensions.
        q_start, q_stop: the range of this rank's queries.
        key_positions: which keys of the whole sequence: int64 indices, or a slice.
        tables: operands ``[heads or 1, entries]``.

    Returns:
        Boolean or floating point, of two dimensions or more, that broadcasts to [batch, heads, queries, keys].
    """
    operands = block_operands(rows, columns, tables, q_start, q_stop, key_positions)
    return torch.atleast_2d(parse(program).run(operands))


def block_operands(
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    tables: Sequence[Tensor],
    q_start: int,
    q_stop: int,
    key_positions: Tensor | slice,
) -> list[Tensor]:
    """The operands of a program at one block; the arguments are those of :func:`block_mask`."""
    at_queries = [_at_keys(_at_queries(x, q_start, q_stop), key_positions) for x in rows]
    return [*at_queries, *(_at_keys(x, key_positions) for x in columns), *tables]


def _at_queries(x: Tensor, start: int, stop: int) -> Tensor:
    return x if x.shape[-2] == 1 else x.narrow(-2, start, stop - start)


def _at_keys(x: Tensor, positions: Tensor | slice) -> Tensor:
    if x.dim() == 0 or x.shape[-1] == 1:
        return x
    return x[..., positions] if isinstance(positions, slice) else x.index_select(-1, positions)
