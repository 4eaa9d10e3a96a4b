"""Which distances from query to key a condition of a mask allows, if it says something of distances alone.

For known lengths a condition is computed at every distance. For open ones the comparison is solved: it must compare
formulas (:mod:`sptransform.masks.closed_forms`) that differ by a function of the distance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import sympy
import torch

from sptransform.masks.closed_forms import KEY, QUERY, ClosedForms
from sptransform.masks.constants import Constants, Position, position
from sptransform.masks.expressions import QUERIES, Apply, Expression, Leaf, parts_of
from sptransform.op_rules.closed_forms import RELATIONS, as_number
from sptransform.op_rules.mask_ops import OF_DISTANCE
from sptransform.sharding.sizes import Size

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

    def holds(self, distance: int) -> bool:
        return (self.nearest is None or self.nearest <= distance) and (
            self.farthest is None or distance <= self.farthest
        )


class Bands(Protocol):
    def of(self, condition: Condition) -> Band | None:
        """The distances at which the condition holds; None if they are no interval, or it reads more than distances."""


class MeasuredBands:
    """For ``num_queries`` x ``num_keys``."""

    def __init__(self, num_queries: int, num_keys: int, constants: Constants) -> None:
        distances = torch.arange(1 - num_keys, num_queries)
        self._distances = distances
        # for every distance, the indices of one query (True) and one key (False) that far apart
        self._indices = {True: distances.clamp(min=0), False: (-distances).clamp(min=0)}
        self._constants = constants
        self._of_distance: dict[Expression, bool] = {}

    def of(self, condition: Condition) -> Band | None:
        part, wanted = condition
        if not self._is_of_distance(part):
            return None
        given = {leaf: x.values[self._indices[x.place == QUERIES]] for leaf, x in self._positions(part).items()}
        holds = self._distances[(self._constants.computed(part, given) == wanted).expand(len(self._distances))]
        if not len(holds) or int(holds[-1] - holds[0]) != len(holds) - 1:
            return None
        first, last = int(holds[0]), int(holds[-1])
        return Band(
            None if first == self._distances[0] else first,
            None if last == self._distances[-1] else last,
        )

    def _is_of_distance(self, part: Expression) -> bool:
        """Whether the part is computed only from constants and query-key distances."""
        if part not in self._of_distance:
            self._of_distance[part] = isinstance(part, Apply) and (
                self._is_distance(part)
                or all(self._constants.cover(x) or self._is_of_distance(x) for x in part.operands)
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
        values = self._constants.computed(part, {leaf: found.values for leaf, found in given.items()})
        return position(places.pop(), values)

    def _positions(self, part: Expression) -> dict[Expression, Position]:
        """The leaves of ``part`` that are positions."""
        found = {leaf: self._constants.of_leaf(leaf) for leaf in parts_of(part) if isinstance(leaf, Leaf)}
        return {leaf: known for leaf, known in found.items() if isinstance(known, Position)}

    def _reads_constants(self, part: Expression) -> bool:
        return all(self._constants.of_leaf(leaf) is not None for leaf in parts_of(part) if isinstance(leaf, Leaf))


def bands_between(num_queries: Size, num_keys: Size, constants: Constants) -> Bands:
    """For lengths that may be open."""
    if isinstance(num_queries, int) and isinstance(num_keys, int):
        return MeasuredBands(num_queries, num_keys, constants)
    return DerivedBands(constants.forms)


_DISTANCE = sympy.Symbol("distance", real=True)


class DerivedBands:
    """For any lengths."""

    def __init__(self, forms: ClosedForms) -> None:
        self._forms = forms

    def of(self, condition: Condition) -> Band | None:
        part, wanted = condition
        if isinstance(part, Leaf) or part.target not in RELATIONS:
            return None
        sides = [self._forms.at(x) if isinstance(x, Leaf | Apply) else x for x in part.args]
        if not all(isinstance(x, int | sympy.Basic) for x in sides):
            return None
        left, right = map(as_number, sides)
        difference = sympy.expand((left - right).subs(QUERY, KEY + _DISTANCE))
        if difference.free_symbols != {_DISTANCE}:
            return None
        relation = RELATIONS[part.target](difference, 0)
        return _band_of(relation if wanted else relation.negated)


def _band_of(relation: sympy.core.relational.Relational) -> Band | None:
    """The integers at which the relation holds; None if they are no interval."""
    try:
        holds = relation.as_set()
    except NotImplementedError:
        return None
    if isinstance(holds, sympy.FiniteSet) and len(holds) == 1:
        (only,) = holds
        return Band(int(only), int(only)) if only.is_Integer else None
    if not isinstance(holds, sympy.Interval):
        return None
    low, high = holds.start, holds.end
    nearest = None if low == -sympy.oo else int(sympy.floor(low) + 1 if holds.left_open else sympy.ceiling(low))
    farthest = None if high == sympy.oo else int(sympy.ceiling(high) - 1 if holds.right_open else sympy.floor(high))
    return Band(nearest, farthest)
