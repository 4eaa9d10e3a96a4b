"""Splits a mask into a band of positions and a rest that needs a program.

A mask is a conjunction: a key is visible where all conditions hold. A condition that depends only on the distance
between query and key, and holds for one interval of distances, becomes bounds of the distance. A condition that always
holds is dropped. The others stay a program. Conditions are evaluated, not matched by op patterns: the truth table of a
boolean expression shows whether it is a conjunction, and a condition is computed at every distance to see where it
holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import inf
from typing import Any

import torch
from torch import Tensor

from sptransform.masks.constants import Constants, Position, Uniform, position
from sptransform.masks.expressions import QUERIES, Apply, Expression, Leaf, parts_of
from sptransform.op_rules.mask_ops import AND, CHOICES, CONVERT, HIDE, NOT, OF_DISTANCE, SUMS

_MAX_INPUTS = 4  # of a truth table

# A boolean expression, and the value it must have for a key to be visible
Condition = tuple[Expression, bool]


@dataclass(frozen=True)
class Band:
    """Query i sees key j only if ``nearest <= i - j <= farthest``; None is no bound."""

    nearest: int | None = None
    farthest: int | None = None

    def __and__(self, other: Band) -> Band:
        nearest = [x for x in (self.nearest, other.nearest) if x is not None]
        farthest = [x for x in (self.farthest, other.farthest) if x is not None]
        return Band(max(nearest, default=None), min(farthest, default=None))


@dataclass(frozen=True)
class Visible:
    """A mask, split: keys outside the band are hidden; inside, ``rest`` decides (None: all are visible)."""

    band: Band
    rest: Expression | None


class Visibility:
    """Splits masks of ``num_queries`` x ``num_keys``."""

    def __init__(self, num_queries: int, num_keys: int, constants: Constants) -> None:
        distances = torch.arange(1 - num_keys, num_queries)
        self._distances = distances
        # for every distance, the indices of one query (True) and one key (False) that far apart
        self._indices = {True: distances.clamp(min=0), False: (-distances).clamp(min=0)}
        self._constants = constants
        self._of_distance: dict[Expression, bool] = {}

    def of(self, mask: Expression) -> Visible:
        """Split ``mask``. In a boolean mask True is visible. Any other mask is added to the scores: a term that is
        -inf wherever a condition fails becomes that condition. Other terms stay, since only -inf hides a key."""
        if mask.dtype == torch.bool:
            conditions, bias = self._conditions(mask, True), None
        else:
            conditions, bias = self._terms(mask)
        band, kept = Band(), []
        for condition in conditions:
            found = self._band(condition)
            if found is None:
                kept.append(condition)
            else:
                band = band & found
        return Visible(band, joined(kept, bias))

    def _conditions(self, part: Expression, wanted: bool) -> list[Condition]:
        """Conditions whose conjunction is ``part == wanted``."""
        found = self._conjunction(part, wanted, not wanted)
        return [(part, wanted)] if found is None else found

    def _terms(self, part: Expression) -> tuple[list[Condition], Expression | None]:
        """Conditions that hide keys by -inf where they fail, and the rest of the bias (None: nothing is left)."""
        found = self._conjunction(part, 0, -inf)
        if found is not None:
            return found, None
        if isinstance(part, Leaf):
            return [], part
        if part.target in SUMS and part.kwargs.get("alpha", 1) == 1:
            operands = [x for x in part.args if isinstance(x, Leaf | Apply) and x.dtype == part.dtype]
            if len(operands) == len(part.args) == 2:
                (a, some), (b, more) = map(self._terms, operands)
                kept = [x for x in (some, more) if x is not None]
                if len(kept) == 2:
                    unchanged = kept == operands
                    return a + b, part if unchanged else Apply(part.target, tuple(kept), part.kwargs, part.dtype)
                return a + b, kept[0] if kept else None
        if part.target is CONVERT and part.args[0].dtype.is_floating_point:
            conditions, rest = self._terms(part.args[0])
            if rest is part.args[0]:
                return conditions, part
            return conditions, None if rest is None else Apply(CONVERT, (rest, part.dtype), {}, part.dtype)
        if part.target in CHOICES and len(part.args) == 3:
            condition, *branches = (part.args[i] for i in CHOICES[part.target])
            if condition.dtype != torch.bool:
                return [], part
            for holds, (taken, other) in ((True, branches), (False, branches[::-1])):
                # one branch is -inf everywhere, so choosing the other branch is a condition of the mask
                if self._is_minus_infinity(other) and isinstance(taken, Leaf | Apply) and taken.dtype == part.dtype:
                    conditions, rest = self._terms(taken)
                    return self._conditions(condition, holds) + conditions, rest
        return [], part

    def _is_minus_infinity(self, x: Any) -> bool:
        if isinstance(x, Leaf | Apply):
            return self._is_constant(x) and bool((self._computed(x, {}) == -inf).all())
        return x == -inf

    def _conjunction(self, part: Expression, visible: Any, hidden: Any) -> list[Condition] | None:
        """Conditions whose conjunction is ``part == visible``.

        None if ``part`` takes a third value, reads anything but booleans and constants, or is visible for several
        combinations of these booleans but not for all.
        """
        inputs = self._boolean_inputs(part)
        if inputs is None or len(inputs) > _MAX_INPUTS:
            return None
        bits = 2 ** torch.arange(len(inputs))
        cases = torch.arange(2 ** len(inputs))[:, None] & bits != 0
        results = self._computed(part, dict(zip(inputs, cases.unbind(1), strict=True))).expand(len(cases))
        sees = results == visible
        if not bool((sees | (results == hidden)).all()):
            return None
        if bool(sees.all()):
            return []
        if int(sees.sum()) != 1:
            return None
        (case,) = cases[sees].tolist()
        return [x for operand, value in zip(inputs, case, strict=True) for x in self._conditions(operand, value)]

    def _boolean_inputs(self, part: Expression) -> list[Expression] | None:
        """The boolean inputs of ``part``; None if it reads anything but booleans and constants."""
        found: dict[Expression, None] = {}
        done: set[Expression] = set()
        stack = [part]
        while stack:
            current = stack.pop()
            if current in done or self._is_constant(current):
                continue
            done.add(current)
            if current is not part and current.dtype == torch.bool:
                found[current] = None
            elif isinstance(current, Leaf):
                return None
            else:
                stack.extend(reversed(current.operands))
        return list(found)

    def _band(self, condition: Condition) -> Band | None:
        """The distances at which the condition holds; None if they are no interval, or it reads more than distances."""
        part, wanted = condition
        if not self._is_of_distance(part):
            return None
        given = {leaf: x.values[self._indices[x.place == QUERIES]] for leaf, x in self._positions(part).items()}
        holds = self._distances[(self._computed(part, given) == wanted).expand(len(self._distances))]
        if not len(holds) or int(holds[-1] - holds[0]) != len(holds) - 1:
            return None
        first, last = int(holds[0]), int(holds[-1])
        return Band(
            None if first == self._distances[0] else first,
            None if last == self._distances[-1] else last,
        )

    def _is_constant(self, part: Expression) -> bool:
        leaves = (x for x in parts_of(part) if isinstance(x, Leaf))
        return all(isinstance(self._constants.of_leaf(leaf), Uniform) for leaf in leaves)

    def _is_of_distance(self, part: Expression) -> bool:
        """Whether the part is computed only from constants and query-key distances."""
        if part not in self._of_distance:
            self._of_distance[part] = isinstance(part, Apply) and (
                self._is_distance(part) or all(self._is_constant(x) or self._is_of_distance(x) for x in part.operands)
            )
        return self._of_distance[part]

    def _is_distance(self, part: Apply) -> bool:
        if part.target not in OF_DISTANCE or len(part.operands) != 2 or part.kwargs.get("alpha", 1) != 1:
            return False
        a, b = map(self._position, part.operands)
        return a is not None and b is not None and a.place != b.place and a.slope * b.slope == OF_DISTANCE[part.target]

    def _position(self, part: Expression) -> Position | None:
        """The part as a position, if it is computed from constants and from positions of queries or of keys."""
        given = self._positions(part)
        places = {found.place for found in given.values()}
        if isinstance(part, Leaf) or len(places) != 1 or not self._reads_constants(part):
            return given.get(part)
        values = self._computed(part, {leaf: found.values for leaf, found in given.items()})
        return position(places.pop(), values)

    def _positions(self, part: Expression) -> dict[Expression, Position]:
        """The leaves of ``part`` that are positions."""
        found = {leaf: self._constants.of_leaf(leaf) for leaf in parts_of(part) if isinstance(leaf, Leaf)}
        return {leaf: known for leaf, known in found.items() if isinstance(known, Position)}

    def _reads_constants(self, part: Expression) -> bool:
        return all(self._constants.of_leaf(leaf) is not None for leaf in parts_of(part) if isinstance(leaf, Leaf))

    def _computed(self, part: Expression, given: dict[Expression, Tensor]) -> Tensor:
        """The value of ``part``; ``given`` holds the values of its non-constant parts."""
        values: dict[Expression, Tensor] = dict(given)

        def put(x: Any) -> Any:
            return values[x] if isinstance(x, Leaf | Apply) else x

        for current in parts_of(part):
            if current in values:
                continue
            if isinstance(current, Leaf):
                constant = self._constants.of_leaf(current)
                if isinstance(constant, Uniform):
                    values[current] = constant.value
            elif all(x in values for x in current.operands):
                kwargs = {key: put(x) for key, x in current.kwargs.items()}
                values[current] = current.target(*map(put, current.args), **kwargs)
        return values[part]


def joined(conditions: Sequence[Condition], bias: Expression | None) -> Expression | None:
    """One mask that hides keys where a condition fails, and adds ``bias`` elsewhere."""
    wanted = [part if value else Apply(NOT, (part,), {}, torch.bool) for part, value in conditions]
    if bias is None:
        return reduce(lambda a, b: Apply(AND, (a, b), {}, torch.bool), wanted) if wanted else None
    if not wanted:
        return bias
    hidden = Apply(NOT, (joined(conditions, None),), {}, torch.bool)
    return Apply(HIDE, (bias, hidden, -inf), {}, bias.dtype)
