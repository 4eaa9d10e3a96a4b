"""What a mask program compares, read so that no mask has to be computed to know where it is true.

A boolean program is often a conjunction of comparisons of something that each query has with something that each key
has: the same document, a position not beyond another one, a key that is no padding. Values that depend on queries
alone, or on keys alone, have one entry a token; they are computed at once. :func:`read` finds the conditions,
:func:`evaluated` computes what they compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor

from sptransform.ops.mask_program import LOOKUP, MaskProgram, Ref, Step, parse

aten = torch.ops.aten

# what an operand or a value of a program has an entry for; "both": each pair, or each head
Side = Literal["number", "query", "key", "both"]

_AND = {"logical_and", "bitwise_and", "__and__"}
_NOT = {"logical_not", "bitwise_not"}
# (nearest, farthest) of ``left - right`` where the comparison of whole numbers is true
_LIMITS: dict[str, tuple[int | None, int | None]] = {
    "ge": (0, None),
    "greater_equal": (0, None),
    "gt": (1, None),
    "greater": (1, None),
    "le": (None, 0),
    "less_equal": (None, 0),
    "lt": (None, -1),
    "less": (None, -1),
}


@dataclass(frozen=True)
class Bound:
    """``nearest <= value of the query - value of the key <= farthest``; None is no limit.

    ``computed``: the program compares the difference, which has the dtype of the values.
    """

    query: int
    key: int
    nearest: int | None
    farthest: int | None
    computed: bool = False


@dataclass(frozen=True)
class Conditions:
    """What has to be true for a key to be visible; numbers are indices of the program's values.

    Args:
        same: pairs (query's value, key's value) that have to be equal.
        bounds: limits of differences.
        of_queries, of_keys: booleans that have to be true.
        is_whole: whether the program says nothing else. If not, it hides some keys that these conditions show.
    """

    same: tuple[tuple[int, int], ...] = ()
    bounds: tuple[Bound, ...] = ()
    of_queries: tuple[int, ...] = ()
    of_keys: tuple[int, ...] = ()
    is_whole: bool = True

    def of(self, side: Side) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The values of queries or of keys: that have to be equal, that are subtracted, that have to be true."""
        if side == "query":
            return tuple(q for q, _ in self.same), tuple(x.query for x in self.bounds), self.of_queries
        return tuple(k for _, k in self.same), tuple(x.key for x in self.bounds), self.of_keys

    def __add__(self, other: Conditions) -> Conditions:
        return Conditions(
            self.same + other.same,
            self.bounds + other.bounds,
            self.of_queries + other.of_queries,
            self.of_keys + other.of_keys,
            self.is_whole and other.is_whole,
        )


_UNREAD = Conditions(is_whole=False)


def sides_of(rows: Sequence[Tensor], columns: Sequence[Tensor], tables: Sequence[Tensor]) -> tuple[Side, ...]:
    """The side of each operand of a program."""
    return (
        *(_side(x, "query") if x.shape[-1] == 1 else "both" for x in rows),
        *(_side(x, "key") for x in columns),
        *("both" for _ in tables),
    )


def _side(x: Tensor, side: Side) -> Side:
    if x.dim() == 0:
        return "number"
    return side if x.dim() < 3 or x.shape[-3] == 1 else "both"


@lru_cache(maxsize=256)
def read(program: str, sides: tuple[Side, ...]) -> Conditions | None:
    """The conditions of a program over operands of these sides; None if none was found."""
    found = _Reader(parse(program), sides).conditions()
    return None if found == _UNREAD else found


def is_decided(program: str, rows: Sequence[Tensor], columns: Sequence[Tensor], tables: Sequence[Tensor]) -> bool:
    """Whether conditions are all that the program says, so that most calls need no mask; operands may be fake."""
    conditions = read(program, sides_of(rows, columns, tables))
    is_exact = not any(x.is_floating_point() for x in (*rows, *columns))
    return is_exact and conditions is not None and conditions.is_whole


class _Reader:
    def __init__(self, program: MaskProgram, sides: tuple[Side, ...]) -> None:
        self._first, self._steps = len(sides), program.steps
        self._sides: list[Side] = list(sides)
        for step in program.steps:
            of_operands = {self._sides[x.index] for x in step.refs} - {"number"}
            if step.target is LOOKUP or len(of_operands) > 1:
                self._sides.append("both")
            else:
                self._sides.append(next(iter(of_operands), "number"))

    def conditions(self) -> Conditions:
        last = self._first + len(self._steps) - 1 if self._steps else 0
        step = self._step(last)
        if step is None or step.target is not aten.masked_fill.Scalar or step.args[2] != -inf:
            return self._of(last)
        # a number is added to the scores of keys that are not hidden: the program has more to say than where
        hidden = self._step(step.args[1].index)
        if hidden is None or _name(hidden) not in _NOT:
            return _UNREAD
        return self._of(hidden.args[0].index) + _UNREAD

    def _of(self, index: int) -> Conditions:
        side, step = self._sides[index], self._step(index)
        if side in ("query", "key"):
            return Conditions(of_queries=(index,)) if side == "query" else Conditions(of_keys=(index,))
        if step is None or len(step.args) != 2 or step.kwargs:
            return _UNREAD
        if _name(step) in _AND:
            return sum((self._of(x.index) if isinstance(x, Ref) else _UNREAD for x in step.args), Conditions())
        return self._comparison(step)

    def _comparison(self, step: Step) -> Conditions:
        name, (left, right) = _name(step), step.args
        difference = self._difference(left, right)
        if difference is None:
            return _UNREAD
        query, key, sign, number, computed = difference
        if name == "eq":
            if number == 0:
                return Conditions(same=((query, key),))
            nearest = farthest = number
        elif name in _LIMITS:
            nearest, farthest = (None if x is None else x + number for x in _LIMITS[name])
        else:
            return _UNREAD
        if sign < 0:
            nearest, farthest = (None if x is None else -x for x in (farthest, nearest))
        return Conditions(bounds=(Bound(query, key, nearest, farthest, computed),))

    def _difference(self, left: Any, right: Any) -> tuple[int, int, int, int, bool] | None:
        """(query, key, sign, number, computed) of a comparison of ``sign * (query - key)`` with a number."""
        number, computed = 0, isinstance(left, Ref) and type(right) is int
        if computed:
            step, number = self._step(left.index), right
            if step is None or _name(step) not in ("sub", "subtract") or step.kwargs or len(step.args) != 2:
                return None
            left, right = step.args
        if not (isinstance(left, Ref) and isinstance(right, Ref)):
            return None
        sides = self._sides[left.index], self._sides[right.index]
        if sides == ("query", "key"):
            return left.index, right.index, 1, number, computed
        return (right.index, left.index, -1, number, computed) if sides == ("key", "query") else None

    def _step(self, index: int) -> Step | None:
        return self._steps[index - self._first] if index >= self._first else None


def _name(step: Step) -> str:
    """The op without its overload."""
    return str(step.target).split(".")[1]


def evaluated(
    program: str, operands: Sequence[Tensor], sides: Sequence[Side], wanted: Sequence[int], side: Side
) -> list[Tensor]:
    """The ``wanted`` values of a program, which depend on ``side`` alone, as [batch or 1, tokens or 1].

    Args:
        operands: of the program; those of queries [.., queries or 1, 1], those of keys [.., 1, keys or 1].
        sides: of the operands.
    """
    parsed = parse(program)
    values: list[Tensor | None] = [
        x if of in (side, "number") else None for x, of in zip(operands, sides, strict=True)
    ]
    needed = _needed(parsed, wanted)
    for index, step in enumerate(parsed.steps, start=parsed.num_operands):
        if index in needed:
            args, kwargs = step.arguments(values)
            values.append(step.target(*args, **kwargs))
        else:
            values.append(None)
    dim = -1 if side == "query" else -2
    return [x.squeeze(dim).flatten(0, -2) if x.dim() > 2 else x.reshape(1, -1) for x in (values[i] for i in wanted)]


def _needed(program: MaskProgram, wanted: Sequence[int]) -> set[int]:
    needed, stack = set(), list(wanted)
    while stack:
        index = stack.pop()
        if index not in needed:
            needed.add(index)
            if index >= program.num_operands:
                stack += [x.index for x in program.steps[index - program.num_operands].refs]
    return needed
