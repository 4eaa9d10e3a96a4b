"""Partitions against sets of indices."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sptransform.sharding.intervals import intersection
from sptransform.sharding.partition import BLOCKS_PER_RANK, Partition
from sptransform.sharding.sizes import SymbolicSizeError

fast = settings(deadline=None, derandomize=True, max_examples=150)


def indices(partition: Partition, rank: int) -> list[int]:
    """What a rank owns, in the order it stores it."""
    return [i for lo, hi in partition.owned[rank] for i in range(lo, hi)]


def all_indices(partition: Partition) -> list[list[int]]:
    return [indices(partition, rank) for rank in range(partition.num_ranks)]


@st.composite
def exact_partitions(
    draw: st.DrawFn, max_size: int = 16, size: int | None = None, num_ranks: int | None = None
) -> Partition:
    """Any exact partition: the axis in pieces, the pieces dealt out, each rank's in ascending order."""
    size = draw(st.integers(1, max_size)) if size is None else size
    num_ranks = draw(st.integers(1, 4)) if num_ranks is None else num_ranks
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


@fast
@given(st.integers(0, 70), st.integers(1, 9))
def test_zigzag(size: int, num_ranks: int) -> None:
    """Along the axis the owners go up and come down again; equal chunks are those ``torch.chunk`` cuts."""
    partition = Partition.zigzag(size, num_ranks)
    assert partition.num_ranks == num_ranks and partition.is_exact
    assert all(own == sorted(own) for own in all_indices(partition))
    owner = {i: rank for rank, own in enumerate(all_indices(partition)) for i in own}
    up = [owner[i] for i in range(size)]
    top = up.index(max(up)) if up else 0
    up, down = up[:top], up[top:]
    assert up == sorted(up) and down == sorted(down, reverse=True)
    assert max(partition.local_sizes) - min(partition.local_sizes) <= 2
    assert partition.is_even or size % num_ranks
    equal = size > 0 and size % (2 * num_ranks) == 0
    assert partition.is_zigzag == equal
    if equal:
        chunks = torch.arange(size).chunk(2 * num_ranks)
        for rank in range(num_ranks):
            assert indices(partition, rank) == [*chunks[rank].tolist(), *chunks[-1 - rank].tolist()]
    assert Partition.parse(str(partition)) == partition


@fast
@given(st.integers(1, 70), st.integers(1, 9))
def test_zigzag_leaves_a_causal_mask_equal_work(size: int, num_ranks: int) -> None:
    """Attended pairs of each rank: equal for equal chunks, else no more apart than what two indices see."""
    pairs = [sum(i + 1 for i in own) for own in all_indices(Partition.zigzag(size, num_ranks))]
    if size % (2 * num_ranks) == 0:
        assert len(set(pairs)) == 1
    assert max(pairs) - min(pairs) <= 2 * size


@fast
@given(st.integers(0, 70), st.integers(1, 9), st.none() | st.integers(1, 12))
def test_striped(size: int, num_ranks: int, block: int | None) -> None:
    """The owners take turns; every turn is a block long, those of the last round are shorter."""
    partition = Partition.striped(size, num_ranks, block)
    assert partition.num_ranks == num_ranks and partition.is_exact
    assert all(own == sorted(own) for own in all_indices(partition))
    assert max(partition.local_sizes) - min(partition.local_sizes) <= 1
    owner = {i: rank for rank, own in enumerate(all_indices(partition)) for i in own}
    if block is not None:
        full = size - size % (block * num_ranks)
        assert [owner[i] for i in range(full)] == [i // block % num_ranks for i in range(full)]
        last = [owner[i] for i in range(full, size)]
        assert last == sorted(last)
        is_striped = num_ranks > 1 and size > block * num_ranks  # otherwise every rank has one interval
        assert partition.stripe == (block if is_striped else None)
        if is_striped:
            assert partition.num_tiles == (size // (block * num_ranks) if full == size else None)
            assert partition.is_uniform == (size % num_ranks == 0)
    assert Partition.parse(str(partition)) == partition


@pytest.mark.parametrize(("size", "block"), [(8192, 64), (8000, 62), (100, 1), (131_072, 1024)])
def test_a_rank_gets_so_many_stripes_by_default(size: int, block: int) -> None:
    partition = Partition.striped(size, 4)
    assert partition == Partition.striped(size, 4, block)
    assert len(partition.owned[0]) <= BLOCKS_PER_RANK + 1


@given(st.integers(1, 5), st.integers(2, 9), st.integers(1, 4), st.integers(1, 3))
@settings(deadline=None, derandomize=True, max_examples=20)
def test_a_symbolic_size_is_shared_as_its_values_are(chunk: int, num_ranks: int, factor: int, refined: int) -> None:
    k = sympy.Symbol("k", integer=True, positive=True)
    forms = (
        (Partition.blocks, num_ranks, ""),
        (Partition.zigzag, 2 * num_ranks, "z"),
        (Partition.striped, BLOCKS_PER_RANK * num_ranks, "s/32"),
    )
    for form, multiple, mark in forms:
        symbolic = form(multiple * factor * k, num_ranks).refine(refined)
        number = form(multiple * factor * chunk, num_ranks).refine(refined)
        assert symbolic.is_exact and symbolic.is_even and symbolic.is_uniform and number.is_uniform
        assert (symbolic.is_blocks, symbolic.is_zigzag) == (number.is_blocks, number.is_zigzag)
        assert symbolic.num_tiles == number.num_tiles
        assert str(symbolic) == f"?/{num_ranks}{mark}"
        part = number.local_size(0)
        assert Partition.parse(str(symbolic), part=part) == Partition.parse(str(symbolic), size=number.size) == number
        assert symbolic.coarsen(refined) == form(multiple * factor * k, num_ranks)
        assert [[(at(lo, chunk), at(hi, chunk)) for lo, hi in own] for own in symbolic.owned] == [
            list(own) for own in number.owned
        ]


def at(size: Any, value: int) -> int:
    """A size in which its symbol has that value."""
    return int(size.subs(dict.fromkeys(size.free_symbols, value))) if isinstance(size, sympy.Expr) else size


def test_a_symbolic_size_that_may_not_be_shared_evenly() -> None:
    k = sympy.Symbol("k", integer=True, positive=True)
    Partition.blocks(4 * k, 4)
    for form in (
        lambda: Partition.zigzag(4 * k, 4),
        lambda: Partition.blocks(2 * k, 4),
        lambda: Partition.striped(8 * k, 4),
    ):
        with pytest.raises(SymbolicSizeError, match="is not known to be a multiple of"):
            form()
    with pytest.raises(SymbolicSizeError, match="the number of blocks of 16 depends"):
        Partition.striped(128 * k, 4, 16)
    with pytest.raises(SymbolicSizeError, match="cannot slice"):
        Partition.zigzag(8 * k, 4).slice(1, 2)


@fast
@given(partitions(), partitions())
def test_common(one: Partition, other: Partition) -> None:
    """Everything in both, in pieces that both store in one run."""
    for mine, theirs in zip(one.owned, other.owned, strict=False):
        found = intersection(mine, theirs)
        both = [{i for lo, hi in own for i in range(lo, hi)} for own in (mine, theirs)]
        assert {i for lo, hi in found for i in range(lo, hi)} == both[0] & both[1]
        assert list(found) == sorted(found)
        for lo, hi in found:
            for own in (mine, theirs):
                assert any(start <= lo < hi <= stop for start, stop in own)


@fast
@given(partitions())
def test_is_contiguous_means_what_chunk_cuts(partition: Partition) -> None:
    chunks = [chunk.tolist() for chunk in torch.arange(partition.size).chunk(partition.num_ranks)]
    chunks += [[]] * (partition.num_ranks - len(chunks))
    same = all_indices(partition) == chunks
    assert partition.is_contiguous == same
    assert Partition.contiguous(partition.size, partition.num_ranks).is_contiguous


def test_touching_intervals_are_one() -> None:
    assert Partition.of(4, [[(0, 1), (1, 2), (2, 2)], [(2, 4)]]) == Partition.contiguous(4, 2)


@pytest.mark.parametrize("interval", [(-1, 2), (0, 5), (2, 2), (3, 1)])
def test_intervals_lie_inside_the_axis(interval: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="outside an axis of size 4"):
        Partition(4, ((interval,),))


@pytest.mark.parametrize(
    ("partition", "even", "exact", "regular"),
    [
        (Partition.contiguous(8, 2), True, True, "blocks"),
        (Partition.contiguous(5, 2), False, True, ""),
        (Partition.contiguous(2, 4), False, True, ""),
        (Partition.of(8, [[(0, 2), (6, 8)], [(2, 6)]]), True, True, "zigzag"),
        (Partition.of(8, [[(6, 8), (0, 2)], [(2, 6)]]), True, True, ""),
        (Partition.of(8, [[(2, 6)], [(0, 2), (6, 8)]]), True, True, ""),
        (Partition.of(8, [[(0, 3), (7, 8)], [(3, 7)]]), True, True, ""),
        (Partition.of(4, [[(0, 2)], [(1, 4)]]), False, False, ""),
        (Partition.of(4, [[(0, 2)], [(2, 3)]]), False, False, ""),
        (Partition.of(4, [[(2, 4)], [(0, 2)]]), True, True, ""),
        (Partition.of(2, [[(0, 1)], [(0, 1)], [(1, 2)], [(1, 2)]]), True, False, ""),
        (Partition.of(0, [[], []]), True, True, ""),
    ],
    ids=str,
)
def test_kinds(partition: Partition, even: bool, exact: bool, regular: str) -> None:
    assert (partition.is_even, partition.is_exact) == (even, exact)
    assert (partition.is_blocks, partition.is_zigzag) == (regular == "blocks", regular == "zigzag")


def test_ranks_that_share_some_of_their_indices_overlap() -> None:
    assert Partition.of(8, [[(0, 5)], [(3, 8)]]).is_overlapping
    shared = Partition.of(2, [[(0, 1)], [(0, 1)], [(1, 2)], [(1, 2)]])
    assert not shared.is_overlapping and not Partition.blocks(8, 2).is_overlapping


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
        (Partition.of(8, [[(0, 2), (6, 8)], [(2, 6)]]), "8/2z"),
        (Partition.of(8, [[(6, 8), (0, 2)], [(2, 6)]]), "8[6:8,0:2|2:6]"),
        (Partition.of(8, [[(2, 6)], [(0, 2), (6, 8)]]), "8[2:6|0:2,6:8]"),
        (Partition.zigzag(64, 4), "64/4z"),
        (Partition.zigzag(6, 2), "6[0:2,5:6|2:5]"),
        (Partition.zigzag(10, 2), "10[0:3,8:10|3:8]"),
        (Partition.striped(64, 4, 4), "64/4s4"),
        (Partition.striped(10, 2, 4), "10/2s4"),
        (Partition.striped(9, 4, 2), "9/4s2"),
        (Partition.striped(7, 4, 2), "7[0:2|2:4|4:6|6:7]"),
        (Partition.striped(8, 4, 2), "8/4"),
        (Partition.striped(9, 1, 2), "9/1"),
        (Partition.blocks(8, 4).tiled(3), "24/4s2"),
        (Partition.zigzag(64, 1), "64/1"),
        (Partition.zigzag(0, 2), "0[|]"),
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


@pytest.mark.parametrize(
    "text",
    ["", "4", "4/", "4/2/2", "4/2zz", "4z", "?/2z", "4[0:2", "4[0-2]", "S(0)", "4[0:2|2:9]"]
    + ["4/2s", "4/2s0", "4/2zs1", "4/2s/2", "?/2s/2"],
)
def test_parse_refuses_other_text(text: str) -> None:
    with pytest.raises(ValueError):
        Partition.parse(text)


def test_parse_refuses_a_size_that_is_not_cut_so() -> None:
    assert Partition.parse("?/2s/2", part=6) == Partition.striped(12, 2, 3)
    for text, part in (("?/2s/2", 3), ("?/2s4", 4)):
        with pytest.raises(ValueError):
            Partition.parse(text, part=part)


@pytest.mark.parametrize(
    ("owned", "in_order"),
    [
        ([[(0, 3)], [(3, 8)]], True),
        ([[(0, 3)], [], [(3, 8)]], True),
        ([[(3, 8)], [(0, 3)]], False),
        ([[(0, 2), (6, 8)], [(2, 6)]], False),
        ([[(0, 5)], [(4, 8)]], False),
    ],
)
def test_is_in_order(owned: list[list[tuple[int, int]]], in_order: bool) -> None:
    assert Partition.of(8, owned).is_in_order == in_order
