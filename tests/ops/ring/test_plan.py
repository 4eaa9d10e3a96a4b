"""The calls of a plan, against the definition of what a query sees, pair by pair."""

from __future__ import annotations

from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from sptransform.ops.ring.plan import Call, Tile, attended_pairs, plan_calls
from sptransform.sharding.intervals import Intervals
from sptransform.sharding.partition import Partition

KINDS = ("full", "band", "causal")


def positions(intervals: Intervals) -> list[int]:
    return [position for lo, hi in intervals for position in range(lo, hi)]


def sees(distance: int, nearest: int | None, farthest: int | None) -> bool:
    return (nearest is None or distance >= nearest) and (farthest is None or distance <= farthest)


def check(
    queries: Intervals,
    keys: Intervals,
    nearest: int | None,
    farthest: int | None,
    masked: bool,
    windows: bool = False,
    tile: Tile | None = None,
) -> None:
    rows, columns = positions(queries), positions(keys)
    covered: dict[tuple[int, int], int] = {}
    for call in plan_calls(queries, keys, nearest, farthest, masked=masked, windows=windows, tile=tile):
        assert 0 <= call.q_start < call.q_stop <= len(rows) and 0 <= call.k_start < call.k_stop <= len(columns)
        assert call.kind in (("full", "band") if masked else ("full", "causal") if windows else KINDS)
        num_rows, num_keys = call.q_stop - call.q_start, call.k_stop - call.k_start
        more = num_keys - num_rows
        if windows and not masked:
            assert more >= 0 or not (call.kind == "causal" or call.sliding)
        else:
            assert not call.sliding and (more == 0 or call.kind != "causal")
        if tile and (masked or call.kind == "band"):
            assert num_rows <= tile.rows
            assert num_rows * num_keys <= tile.rows * tile.span or (tile.whole_rows and num_rows == 1)
        for i in range(call.q_start, call.q_stop):
            for j in range(call.k_start, call.k_stop):
                hidden = call.kind == "causal" and j - call.k_start > i - call.q_start + more
                hidden |= call.sliding and j - call.k_start < i - call.q_start
                hidden |= call.kind == "band" and not sees(rows[i] - columns[j], nearest, farthest)
                if not hidden:
                    covered[i, j] = covered.get((i, j), 0) + 1
    expected = {
        (i, j): 1
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
        if sees(row - column, nearest, farthest)
    }
    assert covered == expected
    assert attended_pairs(queries, keys, nearest, farthest) == len(expected)


@st.composite
def intervals(draw: st.DrawFn) -> Intervals:
    """Up to three intervals, now and then not in the order of their positions."""
    bounds = sorted(draw(st.sets(st.integers(0, 24), min_size=0, max_size=6)))
    pieces = [(lo, hi) for lo, hi in pairwise(bounds)][::2]
    return tuple(draw(st.permutations(pieces)))


limits = st.none() | st.integers(-26, 26)


tiles = st.none() | st.builds(Tile, st.integers(1, 4), st.integers(1, 8), st.booleans())


@given(intervals(), intervals(), limits, limits, st.booleans(), st.booleans(), tiles)
@settings(deadline=None, max_examples=600)
def test_every_visible_pair_is_covered_once(
    queries: Intervals, keys: Intervals, nearest: int | None, farthest: int | None, masked: bool, windows: bool,
    tile: Tile | None,
) -> None:  # fmt: skip
    """By calls that are no larger than a tile, if they have a mask."""
    check(queries, keys, nearest, farthest, masked, windows, tile)


@given(intervals(), st.integers(1, 24), limits, limits, st.integers(1, 4), st.integers(1, 8))
@settings(deadline=None, max_examples=200)
def test_whole_rows(
    queries: Intervals, num_keys: int, nearest: int | None, farthest: int | None, rows: int, span: int
) -> None:
    """Every row is in one call."""
    tile = Tile(rows, span, whole_rows=True)
    calls = plan_calls(queries, ((0, num_keys),), nearest, farthest, masked=True, tile=tile)
    found = [row for call in calls for row in range(call.q_start, call.q_stop)]
    assert len(found) == len(set(found))


def test_the_mask_of_a_call_does_not_grow_with_the_keys() -> None:
    """Where all see all no mask hides by position, and under causality only a part of each tile's keys has one."""
    for whole_rows in (False, True):
        tile = Tile(512, 1024, whole_rows)
        for size in (4096, 65_536):
            calls = plan_calls(((0, 4096),), ((0, size),), 4096 - size, None, masked=True, tile=tile)
            assert max((x.q_stop - x.q_start) * (x.k_stop - x.k_start) for x in calls) <= 512 * 1024
    bands = [x for x in plan_calls(((0, 4096),), ((0, 4096),), 0, None, masked=True) if x.kind == "band"]
    assert all(x.q_stop - x.q_start == 512 and x.k_stop - x.k_start == 511 for x in bands) and len(bands) == 8


def test_a_tile_is_no_larger_than_the_queries_unless_it_is_small() -> None:
    for num_queries, head_dim in ((64, 8), (2048, 64), (8192, 128), (131_072, 128)):
        tile = Tile.of(num_queries, head_dim)
        assert tile.rows * tile.span <= max(512 * 1024, num_queries * head_dim)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize(("nearest", "farthest"), [(0, None), (0, 4), (-3, 3), (None, None), (None, 2)])
def test_layouts(num_ranks: int, layout: str, nearest: int | None, farthest: int | None) -> None:
    for size in (2 * num_ranks * 3, 17, 3):
        partition = getattr(Partition, layout)(size, num_ranks)
        for own in partition.owned:
            for theirs in (*partition.owned, ((0, size),)):
                check(own, theirs, nearest, farthest, masked=False)


def test_causal_zigzag_is_one_call_a_block() -> None:
    partition = Partition.zigzag(64, 4)
    for rank, own in enumerate(partition.owned):
        for other, theirs in enumerate(partition.owned):
            (call,) = plan_calls(own, theirs, 0, None)
            if other == rank:
                assert call == Call(0, 16, 0, 16, "causal")
            elif other < rank:
                assert call == Call(0, 16, 0, 8, "full")
            else:
                assert call == Call(8, 16, 0, 16, "full")


def test_what_is_not_seen_is_not_computed() -> None:
    partition = Partition.contiguous(64, 4)
    assert plan_calls(partition.owned[1], partition.owned[2], 0, None) == ()
    assert plan_calls(partition.owned[1], partition.owned[1], 1, 0) == ()
    # a window of 100 keys: tiles look at their rows' windows only
    calls = plan_calls(((0, 4096),), ((0, 4096),), 0, 99)
    assert sum((call.q_stop - call.q_start) * (call.k_stop - call.k_start) for call in calls) < 4096 * (512 + 100)


def test_a_window_is_one_call_for_kernels_that_have_windows() -> None:
    """Rows that see ever more keys, then a window that slides, are two runs; the keys before are one."""
    partition = Partition.contiguous(4096, 2)
    own, before = partition.owned[1], partition.owned[0]
    assert plan_calls(own, own, 0, 99, windows=True) == (
        Call(0, 99, 0, 99, "causal"),
        Call(99, 2048, 0, 2048, "causal", sliding=True),
    )
    assert plan_calls(own, before, 0, 99, windows=True) == (Call(0, 99, 1949, 2048, "full", sliding=True),)
    assert plan_calls(own, ((0, 4096),), 0, 99, windows=True) == (Call(0, 2048, 1949, 4096, "causal", sliding=True),)


def work(partition: Partition) -> list[int]:
    whole = ((0, partition.size),)
    return [attended_pairs(own, whole, 0, None) for own in partition.owned]


def imbalance(partition: Partition) -> float:
    pairs = work(partition)
    return max(pairs) * len(pairs) / sum(pairs) - 1


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8, 64])
def test_zigzag_is_balanced(num_ranks: int) -> None:
    assert len(set(work(Partition.zigzag(2 * num_ranks * 7, num_ranks)))) == 1
    for size in (4001, 8191, 131_071):
        if num_ranks <= 8:
            assert imbalance(Partition.zigzag(size, num_ranks)) <= 0.01
    assert imbalance(Partition.zigzag(131_071, num_ranks)) <= 0.01


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_contiguous_is_not(num_ranks: int) -> None:
    size = num_ranks * 12
    assert imbalance(Partition.contiguous(size, num_ranks)) == pytest.approx((size - 12) / (size + 1), abs=1e-12)
