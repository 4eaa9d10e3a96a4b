"""Splits a mask into a band of positions and a rest that needs a program.

A mask is a conjunction: a key is visible where all conditions hold. A condition that depends only on the distance
between query and key, and holds for one interval of distances, becomes bounds of the distance. A condition that always
holds is dropped. The others stay a program. Conditions are evaluated, not matched by op patterns: the truth table of a
boolean expression shows whether it is a conjunction; ``masks/bands.py`` finds where a condition holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import inf
from typing import Any

import torch

from sptransform.masks.bands import Band, Condition, bands_between
from sptransform.masks.constants import Constants
from sptransform.masks.expressions import Apply, Expression, Leaf
from sptransform.op_rules.mask_ops import AND, CHOICES, CONVERT, HIDE, NOT, SUMS
from sptransform.sharding.sizes import Size

_MAX_INPUTS = 4  # of a truth table
_ABSORBING = -1e30  # any score added to it, in 64 bits or fewer, is lost to rounding


@dataclass(frozen=True)
class Visible:
    """A mask, split: keys outside the band are hidden; inside, ``rest`` decides (None: all are visible)."""

    band: Band
    rest: Expression | None


class Visibility:
    """Splits masks.

    Args:
        num_queries, num_keys: the sizes of the masks, which may be open.
        constants: of the graph that computes them.
    """

    def __init__(self, num_queries: Size, num_keys: Size, constants: Constants) -> None:
        self._constants = constants
        self._bands = bands_between(num_queries, num_keys, constants)
        self._is_aligned = num_queries == num_keys  # every query has a key at its own position

    def of(self, mask: Expression) -> Visible:
        """Split ``mask``. In a boolean mask True is visible. Any other mask is added to the scores: a term that is
        -inf wherever a condition fails becomes that condition. Other terms stay, since only -inf hides a key."""
        if mask.dtype == torch.bool:
            conditions, bias = self._conditions(mask, True), None
        else:
            found = self._hidden_by_the_lowest(mask)
            conditions, bias = self._terms(mask) if found is None else (found, None)
        band, kept = Band(), []
        for condition in conditions:
            found = self._bands.of(condition)
            if found is None:
                kept.append(condition)
            else:
                band = band & found
        return Visible(band, joined(kept, bias))

    def _hidden_by_the_lowest(self, mask: Expression) -> list[Condition] | None:
        """Conditions that hide keys where they fail, if the mask is the lowest number there and 0 elsewhere.

        Where a query sees a key, the lowest number is as good as -inf: it absorbs any score, and its exponential is 0.
        Where it sees none, all keys count alike; so every query has to see the key at its own position.
        """
        lowest = torch.finfo(mask.dtype).min if mask.dtype.is_floating_point else 0.0
        if not self._is_aligned or lowest > _ABSORBING:
            return None
        found = self._conjunction(mask, 0, lowest)
        bands = [self._bands.of(condition) for condition in found or ()]
        return found if all(band is not None and band.holds(0) for band in bands) else None

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
            return self._constants.cover(x) and bool((self._constants.computed(x, {}) == -inf).all())
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
        results = self._constants.computed(part, dict(zip(inputs, cases.unbind(1), strict=True))).expand(len(cases))
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
            if current in done or self._constants.cover(current):
                continue
            done.add(current)
            if current is not part and current.dtype == torch.bool:
                found[current] = None
            elif isinstance(current, Leaf):
                return None
            else:
                stack.extend(reversed(current.operands))
        return list(found)

def joined(conditions: Sequence[Condition], bias: Expression | None) -> Expression | None:
    """One mask that hides keys where a condition fails, and adds ``bias`` elsewhere."""
    wanted = [part if value else Apply(NOT, (part,), {}, torch.bool) for part, value in conditions]
    if bias is None:
        return reduce(lambda a, b: Apply(AND, (a, b), {}, torch.bool), wanted) if wanted else None
    if not wanted:
        return bias
    hidden = Apply(NOT, (joined(conditions, None),), {}, torch.bool)
    return Apply(HIDE, (bias, hidden, -inf), {}, bias.dtype)
