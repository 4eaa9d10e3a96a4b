"""The block attention calls of a rank where data says which keys its queries see: packed documents, padding.

Which rank owns which tokens is known before; where documents end is known when the op runs. Queries and keys are cut
into segments along which nothing that the mask compares changes. A segment of queries meets only segments of keys with
the same labels, and of each pair the limits of distances leave a band, which :func:`plan.plan_calls` covers. So a rank
calls kernels for pairs of pieces of the same document, full or causal, and for nothing else. The pieces of a document
that a striped rank stores one after the other are one group of keys, which a segment of queries meets at once.

One call with a computed mask stands for those of small pieces, since every call has a cost of its own. Kernels that
take many pieces in one call (:mod:`joined`) do without.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from sptransform.ops.ring.conditions import Bound, Conditions, evaluated, read, sides_of
from sptransform.ops.ring.plan import SPAN, Call, Tile, plan_calls
from sptransform.ops.ring.segments import Segment, segments, stored
from sptransform.sharding.intervals import Intervals

# the most rows and keys of a call that stands for several ones, by default
SMALL = 64
# how often a row may be merged more than in tiles of a mask, and how many pairs of segments it may cost, on average
FEW = 4
# more than that many calls, of fewer than SHORT rows on average, cost more than masks of whole tiles
MANY, SHORT = 64, 16


class DataPlan:
    """Plans the calls of a rank's queries on any block of keys.

    Args:
        conditions: of the program, and limits of positions among its bounds.
        queries: the segments of this rank's queries, for every row of the batch or for all at once.
        keys: the segments of all keys, likewise.
        windows, tile: as of :func:`plan.plan_calls`.
        small: the most rows and keys of a call that stands for several ones.
    """

    def __init__(
        self,
        conditions: Conditions,
        queries: Sequence[list[Segment]],
        keys: Sequence[list[Segment]],
        windows: bool,
        tile: Tile | None,
        small: int,
    ) -> None:
        self._conditions, self._windows, self._tile, self._small = conditions, windows, tile, small
        rows = max(len(queries), len(keys))
        self._of_rows = [(queries[row % len(queries)], keys[row % len(keys)]) for row in range(rows)]

    @staticmethod
    def of(
        program: str,
        operands: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]],
        positions: Tensor,
        num_keys: int,
        limits: tuple[int | None, int | None],
        windows: bool = False,
        tile: Tile | None = None,
        small: int | None = None,
    ) -> DataPlan | None:
        """The plan under a mask program and limits of positions; None if the program is no help.

        Args:
            operands: rows, columns and tables of the program.
            positions: of this rank's queries.
            num_keys: of all ranks.
            windows, tile: as of :func:`plan.plan_calls`.
            small: the most rows and keys of a call that stands for several ones, by default ``SMALL``.
        """
        sides = sides_of(*operands)
        conditions = read(program, sides)
        if conditions is None:
            return None
        found, dtypes = [], []
        for side, of_token in (("query", positions), ("key", torch.arange(num_keys, device=positions.device))):
            labels, subtracted, shown = (
                evaluated(program, [x for xs in operands for x in xs], sides, wanted, side)
                for wanted in conditions.of(side)
            )
            if any(x.is_floating_point() for x in (*labels, *subtracted)) or any(x.dtype != torch.bool for x in shown):
                return None
            dtypes.append([x.dtype for x in subtracted])
            if limits != (None, None):
                subtracted.append(of_token[None])
            found.append(segments(labels, subtracted, shown, len(of_token)))
        if not _are_exact(conditions.bounds, dtypes, found):
            return None
        if limits != (None, None):
            conditions = replace(conditions, bounds=(*conditions.bounds, Bound(-1, -1, *limits)))
        return DataPlan(conditions, *found, windows, tile, SMALL if small is None else small)

    @property
    def is_batched(self) -> bool:
        """Whether rows of the batch have calls of their own."""
        return len(self._of_rows) > 1

    def calls(self, keys: Intervals) -> tuple[Call, ...] | None:
        """The calls on a block of keys; None where pieces are so many that masks of whole tiles are as good."""
        planned = []
        for of_queries, of_keys in self._of_rows:
            calls = self._calls(of_queries, stored(of_keys, keys))
            if calls is None:
                return None
            planned.append(calls)
        if len(planned) == 1:
            return tuple(planned[0])
        found = []
        for calls, group in groupby(range(len(planned)), key=planned.__getitem__):
            rows = list(group)
            found += [replace(call, batch=(rows[0], rows[-1] + 1)) for call in calls]
        return tuple(found)

    def _calls(self, queries: list[Segment], keys: list[Segment]) -> list[Call] | None:
        of_label = _grouped(keys)
        size = sum(segment.stop - segment.start for segment in queries)
        num_keys = max((segment.stop for segment in keys), default=0)
        merged, pairs = size * (FEW + num_keys // SPAN), max(MANY, size) * FEW
        found = []
        for segment in queries:
            met = of_label[segment.labels]
            merged -= len(met) * (segment.stop - segment.start)
            pairs -= sum(len(group.segments) for group in met)
            if min(merged, pairs) < 0 or (len(met) > 1 and self._tile is not None and self._tile.whole_rows):
                return None
            found.append([call for group in met for call in self._pair(segment, group)])
        calls = _shared(found, self._small)
        # kernels that take many pieces in one call take those that are decided
        apart = len(calls) if self._small else sum(call.sliding or not call.decided for call in calls)
        return None if apart > max(MANY, size // SHORT) else calls

    def _pair(self, queries: Segment, group: Group) -> list[Call]:
        """The calls of a segment and a group. At distance 0 of their own numbers, the difference is that of firsts."""
        first = group.segments[0]
        nearest = farthest = None
        for bound, query, key in zip(self._conditions.bounds, queries.firsts, first.firsts, strict=True):
            if bound.nearest is not None:
                limit = bound.nearest - (query - key)
                nearest = limit if nearest is None else max(nearest, limit)
            if bound.farthest is not None:
                limit = bound.farthest - (query - key)
                farthest = limit if farthest is None else min(farthest, limit)
        rows, masked = ((0, queries.stop - queries.start),), not self._conditions.is_whole
        # not from the cache of plans, which other data would fill
        calls = plan_calls.__wrapped__(
            rows, group.intervals, nearest, farthest, masked=masked, windows=self._windows, tile=self._tile
        )
        return [
            replace(
                call,
                q_start=queries.start + call.q_start,
                q_stop=queries.start + call.q_stop,
                k_start=first.start + call.k_start,
                k_stop=first.start + call.k_stop,
                decided=not masked and call.kind != "band",
            )
            for call in calls
        ]


def _are_exact(
    bounds: Sequence[Bound], dtypes: Sequence[Sequence[torch.dtype]], found: Sequence[Sequence[list[Segment]]]
) -> bool:
    """Whether no difference that the program computes may be beyond its dtype, where it would begin again.

    Args:
        bounds: of the program.
        dtypes: of what is subtracted, of queries and of keys.
        found: the segments of queries and of keys.
    """
    for i, (bound, *of_sides) in enumerate(zip(bounds, *dtypes, strict=True)):
        if bound.computed:
            info = torch.iinfo(torch.promote_types(*of_sides))
            limits = [abs(x) for x in (bound.nearest, bound.farthest) if x is not None]
            ranges = [[(x.firsts[i], x.firsts[i] + x.stop - x.start) for xs in rows for x in xs] for rows in found]
            lows, highs = ([of([x[at] for x in xs], default=0) for xs in ranges] for at, of in ((0, min), (1, max)))
            if info.min == 0 or max(highs[0] - lows[1], highs[1] - lows[0], *limits) >= info.max:
                return False
    return True


@dataclass
class Group:
    """Segments of keys that are stored one after the other, and differ in all that is subtracted by one number.

    They are one block of keys to a query: the pieces of a document in a striped layout.
    """

    segments: list[Segment]

    def takes(self, segment: Segment) -> bool:
        first = self.segments[0]
        moved = {b - a for a, b in zip(first.firsts, segment.firsts, strict=True)}
        return self.segments[-1].stop == segment.start and len(moved) < 2

    @cached_property
    def intervals(self) -> Intervals:
        """Their numbers, counted from the first's; where nothing is subtracted, as they are stored."""
        first, found = self.segments[0], []
        for x in self.segments:
            at = x.firsts[0] - first.firsts[0] if x.firsts else x.start - first.start
            found.append((at, at + x.stop - x.start))
        return tuple(found)


def _grouped(segments: Sequence[Segment]) -> dict[tuple[int, ...], list[Group]]:
    """The groups of each label."""
    of_label: dict[tuple[int, ...], list[Group]] = defaultdict(list)
    for segment in segments:
        groups = of_label[segment.labels]
        if groups and groups[-1].takes(segment):
            groups[-1].segments.append(segment)
        else:
            groups.append(Group([segment]))
    return of_label


def _shared(of_segments: Sequence[list[Call]], small: int) -> list[Call]:
    """All calls; one instead of those of consecutive segments, while all their queries and keys are few.

    Such a call computes what its queries see among its keys, so it stands for all calls of these queries.
    """
    found: list[Call] = []
    group: list[Call] = []
    for calls in filter(None, of_segments):
        if group and not _is_small([*group, *calls], small):
            found += _one_call(group)
            group = []
        group += calls
        if not _is_small(group, small):
            found += group
            group = []
    return found + _one_call(group)


def _is_small(calls: Sequence[Call], small: int) -> bool:
    queries = max(call.q_stop for call in calls) - min(call.q_start for call in calls)
    keys = max(call.k_stop for call in calls) - min(call.k_start for call in calls)
    return queries <= small and keys <= small


def _one_call(calls: list[Call]) -> list[Call]:
    if len(calls) < 2:
        return calls
    starts = min(call.q_start for call in calls), min(call.k_start for call in calls)
    stops = max(call.q_stop for call in calls), max(call.k_stop for call in calls)
    return [Call(starts[0], stops[0], starts[1], stops[1], "band")]
