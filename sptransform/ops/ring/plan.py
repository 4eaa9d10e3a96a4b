"""The block attention calls that cover what one rank's queries see in one block of keys.

Queries and keys are given as intervals of positions, in storage order. A query at position i sees the key at position
j iff ``nearest <= i - j <= farthest``; None is no limit. Among ascending keys, a query therefore sees a range
``low .. high - 1``. From one position to the next, each end of the range stays or grows by one. A :class:`Run` is
a stretch of consecutive queries in which this does not change. All calls follow from the runs:

====================  ==================================================  ===============================
run                   rows                                                calls
====================  ==================================================  ===============================
neither end grows     all see the same keys                               ``full``
the upper end grows   row n sees n + 1 keys more than ``low .. high - 1``  ``full``, and a square ``causal``
the lower end grows   a window that slides or shrinks                     tiles of rows, ``full`` where all
                                                                          see a key, ``band`` elsewhere
====================  ==================================================  ===============================

Where the kernel has windows each run is one call without a mask, whatever grows.

Under causal zigzag (rank r owns chunks r and 2N-1-r) that is one call per block: ``causal`` for a rank's own keys,
``full`` over half of the keys of an earlier rank, ``full`` for half of the queries over the keys of a later one.

A call with a computed mask, which is a ``band`` or any call that is not decided under a mask program, has at most as
many pairs as a :class:`Tile` allows. So a mask does not grow with the number of keys.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from sptransform.sharding.intervals import Intervals

# rows per call with a computed mask: masks stay small, and a sliding window spends little work on hidden keys
TILE = 512
# keys per call with a computed mask; fewer cost time, since every call is merged into the result
SPAN = 1024


@dataclass(frozen=True)
class Call:
    """Queries ``q_start .. q_stop - 1`` over keys ``k_start .. k_stop - 1``, numbered as stored.

    ``kind`` is "full" (all see all), "causal" (the last query sees all, and each query one key less than the next), or
    "band" (positions decide). With ``sliding``, which is for kernels that have windows, the n-th query does not see the
    first n keys. Causal or sliding calls have at least as many keys as queries; causal ones have as many, if they are
    for kernels that have no windows. Where there is a mask program too, it hides some of the keys unless ``decided``.
    ``batch`` is the range of rows of the batch, None for all.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    kind: str
    sliding: bool = False
    decided: bool = False
    batch: tuple[int, int] | None = None


@dataclass(frozen=True)
class Tile:
    """What a call with a computed mask may cover: ``rows`` queries, and ``rows * span`` pairs.

    With ``whole_rows`` a call has all keys that its rows see, and as many rows as the pairs leave.
    """

    rows: int
    span: int
    whole_rows: bool = False

    @staticmethod
    def of(num_queries: int, head_dim: int, *, whole_rows: bool = False) -> Tile:
        """A tile that has no more pairs than the queries of one head have numbers, or few.

        Its mask is then small beside the queries, and is divided by the number of ranks as they are. A tile of one size
        for all lengths would cut long sequences into more calls than a fast device is kept busy by.
        """
        return Tile(TILE, max(SPAN, num_queries * head_dim // TILE), whole_rows)

    def cut(self, num_keys: int) -> tuple[int, int]:
        """The number of rows and of keys of calls whose rows see up to ``num_keys`` keys."""
        if not self.whole_rows:
            return self.rows, self.span
        return max(1, min(self.rows, self.rows * self.span // max(1, num_keys))), num_keys


@dataclass(frozen=True)
class Run:
    """Row n of ``q_start .. q_stop - 1`` sees the keys from ``low`` to below ``high``.

    With ``closes`` the range begins at ``low + n``; with ``opens`` it ends below ``high + n + 1``.
    """

    q_start: int
    q_stop: int
    low: int
    high: int
    closes: bool
    opens: bool

    @property
    def num_rows(self) -> int:
        return self.q_stop - self.q_start

    @property
    def num_pairs(self) -> int:
        rows = self.num_rows
        grown = rows * (rows + 1) // 2 if self.opens else 0
        shrunk = rows * (rows - 1) // 2 if self.closes else 0
        return rows * (self.high - self.low) + grown - shrunk

    def followed_by(self, other: Run) -> bool:
        """Whether ``other`` continues this run."""
        return (
            (self.q_stop, self.closes, self.opens) == (other.q_start, other.closes, other.opens)
            and other.low == self.low + (self.num_rows if self.closes else 0)
            and other.high == self.high + (self.num_rows if self.opens else 0)
        )


@lru_cache(maxsize=4096)
def plan_calls(
    queries: Intervals,
    keys: Intervals,
    nearest: int | None,
    farthest: int | None,
    *,
    masked: bool = False,
    windows: bool = False,
    tile: Tile | None = None,
) -> tuple[Call, ...]:
    """Calls that cover every visible pair exactly once; any other pair they cover is hidden by a ``band``.

    With ``masked`` every call has a computed mask, so no call is ``causal`` and all are cut by ``tile``, a small one if
    it is not given. With ``windows`` the kernel has windows, and uses them where there is no mask.
    """
    runs = _runs(queries, keys, nearest, farthest)
    if windows and not masked:
        return tuple(_window(run) for run in runs)
    tile = tile or Tile(TILE, SPAN)
    return tuple(call for run in runs for call in _calls(run, masked, tile))


def attended_pairs(queries: Intervals, keys: Intervals, nearest: int | None, farthest: int | None) -> int:
    """The number of visible (query, key) pairs, a measure of work."""
    return sum(run.num_pairs for run in _runs(queries, keys, nearest, farthest))


def _window(run: Run) -> Call:
    # a row that slides sees the key at its lower end, so that no run has fewer keys than rows
    high = run.high + (run.num_rows if run.opens else 0)
    return Call(run.q_start, run.q_stop, run.low, high, "causal" if run.opens else "full", run.closes)


def _calls(run: Run, masked: bool, tile: Tile) -> Iterator[Call]:
    if not masked and not run.closes:
        if run.high > run.low:
            yield Call(run.q_start, run.q_stop, run.low, run.high, "full")
        if run.opens:
            yield Call(run.q_start, run.q_stop, run.high, run.high + run.num_rows, "causal")
        return
    rows, span = tile.cut(run.high - run.low + run.num_rows * run.opens)
    for start in range(run.q_start, run.q_stop, rows):
        stop = min(start + rows, run.q_stop)
        for k_start, k_stop, kind in _pieces(run, start, stop, tile.whole_rows):
            # a call that has no mask need not be cut
            step = span if masked or kind == "band" else k_stop - k_start
            for first in range(k_start, k_stop, step):
                yield Call(start, stop, first, min(first + step, k_stop), kind)


def _pieces(run: Run, start: int, stop: int, whole: bool) -> Iterator[tuple[int, int, str]]:
    """The keys that rows ``start .. stop - 1`` of a run see: ranges, and the kind of a call on each.

    ``whole`` asks for one range.
    """
    first, last = start - run.q_start, stop - 1 - run.q_start
    low, low_of_all = (run.low + first, run.low + last) if run.closes else (run.low, run.low)
    high_of_all, high = (run.high + first + 1, run.high + last + 1) if run.opens else (run.high, run.high)
    if low == low_of_all and high == high_of_all:
        yield low, high, "full"
    elif whole or low_of_all >= high_of_all:
        yield low, high, "band"
    else:
        ranges = (low, low_of_all, "band"), (low_of_all, high_of_all, "full"), (high_of_all, high, "band")
        yield from (piece for piece in ranges if piece[0] < piece[1])


def _runs(queries: Intervals, keys: Intervals, nearest: int | None, farthest: int | None) -> list[Run]:
    if nearest is not None and farthest is not None and nearest > farthest:
        return []
    runs: list[Run] = []
    for first, ascending in _ascending(keys):
        of_group: list[Run] = []
        for run in _runs_over(queries, first, ascending, nearest, farthest):
            if of_group and of_group[-1].followed_by(run):
                last = of_group.pop()
                run = Run(last.q_start, run.q_stop, last.low, last.high, last.closes, last.opens)
            of_group.append(run)
        runs += [run for run in of_group if run.num_pairs]
    return runs


def _ascending(keys: Intervals) -> Iterator[tuple[int, Intervals]]:
    """Groups of intervals whose positions ascend, each with the number of keys stored before it."""
    group: list[tuple[int, int]] = []
    first = at = 0
    for lo, hi in keys:
        if group and lo < group[-1][1]:
            yield first, tuple(group)
            group, first = [], at
        group.append((lo, hi))
        at += hi - lo
    if group:
        yield first, tuple(group)


def _runs_over(
    queries: Intervals, first: int, keys: Intervals, nearest: int | None, farthest: int | None
) -> Iterator[Run]:
    """Runs over ascending keys, the first key stored at ``first``; cut where an end begins or stops growing."""
    bounds = [bound for interval in keys for bound in interval]
    stored = [first]
    for lo, hi in keys:
        stored += [stored[-1] + hi - lo, stored[-1] + hi - lo]

    def below(position: int) -> tuple[int, bool]:
        """Where the first key not below ``position`` is stored, and whether it is at that position."""
        at = bisect_left(bounds, position + 1)  # the number of bounds passed; odd inside an interval
        inside = at % 2 == 1
        return (stored[at] - (bounds[at] - position) if inside else stored[at]), inside

    shifts = [limit for limit in (nearest, farthest) if limit is not None]
    at = 0
    for q_lo, q_hi in queries:
        cuts = {q_lo, q_hi, *(x for shift in shifts for b in bounds if q_lo < (x := b + shift) < q_hi)}
        for start, stop in pairwise(sorted(cuts)):
            low, closes = (first, False) if farthest is None else below(start - farthest)
            high, opens = (stored[-1], False) if nearest is None else below(start - nearest)
            yield Run(at + start - q_lo, at + stop - q_lo, low, high, closes, opens)
        at += q_hi - q_lo
