"""Partitions against sets of indices."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sptransform.partition import Partition

fast = settings(deadline=None, derandomize=True, max_examples=150)


def indices(partition: Partition, rank: int) -> list[int]:
    """What a rank owns, in the order it stores it."""
    return [i for lo, hi in partition.owned[rank] for i in range(lo, hi)]


def all_indices(partition: Partition) -> list[list[int]]:
    return [indices(partition, rank) for rank in range(partition.num_ranks)]


@st.composite
def exact_partitions(draw: st.DrawFn, max_size: int = 16) -> Partition:
    """Any exact partition: the axis in pieces, the pieces dealt out, each rank's in ascending order."""
    size = draw(st.integers(1, max_size))
    num_ranks = draw(st.integers(1, 4))
    bounds = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=6))})
    owned: list[list[tuple[int, int]]] = [[] for _ in range(num_ranks)]
    for lo, hi in pairwise(bounds):
        owned[draw(st.integers(0, num_ranks - 1))].append((lo, hi))
    return Partition.of(size, owned)


@st.composite
def partitions(draw: st.DrawFn) -> Partition:
    """Any partition at all: intervals in any order, of overlapping ranks, not covering the axis."""
    size = draw(st.integers(1, 16))
    interval = st.tuples(st.integers(0, size), st.integers(0, size)).map(lambda pair: tuple(sorted(pair)))
    return Partition.of(size, draw(st.lists(st.lists(interval, max_size=3), min_size=1, max_size=4)))


@pytest.mark.parametrize(
    ("size", "num_ranks", "sizes"), [(8, 2, (4, 4)), (5, 2, (3, 2)), (5, 3, (2, 2, 1)), (5, 4, (2, 2, 1, 0))]
)
def test_contiguous(size: int, num_ranks: int, sizes: tuple[int, ...]) -> None:
    partition = Partition.contiguous(size, num_ranks)
    assert partition.local_sizes == sizes
    assert [i for own in all_indices(partition) for i in own] == list(range(size))


@pytest.mark.parametrize(("size", "num_ranks", "sizes"), [(8, 2, (4, 4)), (5, 3, (1, 2, 2)), (6, 4, (1, 2, 1, 2))])
def test_balanced(size: int, num_ranks: int, sizes: tuple[int, ...]) -> None:
    partition = Partition.balanced(size, num_ranks)
    assert partition.local_sizes == sizes
    assert [i for own in all_indices(partition) for i in own] == list(range(size))


def test_touching_intervals_are_one() -> None:
    assert Partition.of(4, [[(0, 1), (1, 2), (2, 2)], [(2, 4)]]) == Partition.contiguous(4, 2)


@pytest.mark.parametrize("interval", [(-1, 2), (0, 5), (2, 2), (3, 1)])
def test_intervals_lie_inside_the_axis(interval: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="outside an axis of size 4"):
        Partition(4, ((interval,),))


@pytest.mark.parametrize(
    ("partition", "even", "exact", "blocks"),
    [
        (Partition.contiguous(8, 2), True, True, True),
        (Partition.contiguous(5, 2), False, True, False),
        (Partition.contiguous(2, 4), False, True, False),
        (Partition.of(8, [[(0, 2), (6, 8)], [(2, 6)]]), True, True, False),
        (Partition.of(4, [[(0, 2)], [(1, 4)]]), False, False, False),
        (Partition.of(4, [[(0, 2)], [(2, 3)]]), False, False, False),
        (Partition.of(4, [[(2, 4)], [(0, 2)]]), True, True, False),
        (Partition.of(2, [[(0, 1)], [(0, 1)], [(1, 2)], [(1, 2)]]), True, False, False),
        (Partition.of(0, [[], []]), True, True, False),
    ],
    ids=str,
)
def test_kinds(partition: Partition, even: bool, exact: bool, blocks: bool) -> None:
    assert (partition.is_even, partition.is_exact, partition.is_blocks) == (even, exact, blocks)


@fast
@given(partitions())
def test_is_exact_means_that_every_index_has_one_owner(partition: Partition) -> None:
    owned = sorted(i for own in all_indices(partition) for i in own)
    assert partition.is_exact == (owned == list(range(partition.size)))


@fast
@given(partitions(), st.integers(0, 16), st.integers(0, 16))
def test_slice(partition: Partition, start: int, stop: int) -> None:
    start, stop = min(start, partition.size), min(stop, partition.size)
    cut = partition.slice(start, stop)
    assert cut.size == max(stop - start, 0)
    expected = [[i - start for i in own if start <= i < stop] for own in all_indices(partition)]
    assert all_indices(cut) == expected


@fast
@given(exact_partitions(), st.integers(0, 3), st.integers(0, 3))
def test_pad(partition: Partition, before: int, after: int) -> None:
    padded = partition.pad(before, after)
    total = before + partition.size + after
    assert padded.size == total and padded.is_exact
    for own, new in zip(all_indices(partition), all_indices(padded), strict=True):
        expected = {i + before for i in own}
        if 0 in own:
            expected |= set(range(before))
        if partition.size - 1 in own:
            expected |= set(range(total - after, total))
        assert set(new) == expected


@fast
@given(exact_partitions(), st.integers(0, 3), st.integers(0, 3))
def test_a_slice_undoes_a_pad(partition: Partition, before: int, after: int) -> None:
    assert partition.pad(before, after).slice(before, before + partition.size) == partition


@fast
@given(partitions(), st.integers(1, 4))
def test_refine(partition: Partition, factor: int) -> None:
    fine = partition.refine(factor)
    assert fine.size == partition.size * factor
    expected = [[i * factor + j for i in own for j in range(factor)] for own in all_indices(partition)]
    assert all_indices(fine) == expected
    assert fine.coarsen(factor) == partition


@fast
@given(partitions(), st.integers(1, 4))
def test_coarsen(partition: Partition, factor: int) -> None:
    coarse = partition.coarsen(factor)
    whole_steps = partition.size % factor == 0 and all(
        bound % factor == 0 for own in partition.owned for interval in own for bound in interval
    )
    assert (coarse is not None) == whole_steps
    if coarse is not None:
        assert coarse.refine(factor) == partition


@fast
@given(partitions(), st.integers(1, 4))
def test_quotient(partition: Partition, group: int) -> None:
    """Each rank needs every ``i // group`` of its own ``i``, once."""
    heads = partition.refine(group)
    needed = heads.quotient(group)
    assert needed.size == partition.size
    for rank in range(heads.num_ranks):
        assert indices(needed, rank) == sorted({i // group for i in indices(heads, rank)})


def test_quotient_of_heads_that_share_a_key() -> None:
    """Six query heads of two key heads over four ranks: the ranks in the middle need one key head each."""
    heads = Partition.balanced(6, 4)
    assert str(heads) == "6[0:1|1:3|3:4|4:6]"
    assert str(heads.quotient(3)) == "2[0:1|0:1|1:2|1:2]"
    assert str(Partition.balanced(6, 2).quotient(2)) == "3[0:2|1:3]"
    # two intervals of one rank under the same key head
    assert str(Partition.of(8, [[(0, 1), (2, 3)], [(3, 6)]]).quotient(4)) == "2[0:1|0:2]"


@pytest.mark.parametrize(
    ("partition", "text"),
    [
        (Partition.contiguous(64, 4), "64/4"),
        (Partition.contiguous(5, 2), "5[0:3|3:5]"),
        (Partition.of(8, [[(0, 2), (6, 8)], [(2, 6)]]), "8[0:2,6:8|2:6]"),
        (Partition.contiguous(2, 3), "2[0:1|1:2|]"),
    ],
    ids=str,
)
def test_printed_form(partition: Partition, text: str) -> None:
    assert str(partition) == text


@fast
@given(partitions())
def test_parse_inverts_str(partition: Partition) -> None:
    assert Partition.parse(str(partition)) == partition


@pytest.mark.parametrize("text", ["", "4", "4/", "4/2/2", "4[0:2", "4[0-2]", "S(0)", "4[0:2|2:9]"])
def test_parse_refuses_other_text(text: str) -> None:
    with pytest.raises(ValueError):
        Partition.parse(text)
