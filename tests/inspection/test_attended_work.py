"""Pairs of query and key by rank: against pairs counted one by one, and what each layout makes of packed documents."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sptransform import UsageError
from sptransform.inspection.attended_work import checked_documents, imbalance, intervals_of, pairs_by_rank
from sptransform.sharding.partition import Partition
from tests.sharding.test_partition import all_indices, partitions

bounds = st.none() | st.integers(-3, 8)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(partitions(), st.lists(st.integers(1, 6), max_size=5), bounds, bounds)
def test_pairs_are_those_of_one_document_within_bounds(
    queries: Partition, lengths: list[int], nearest: int | None, farthest: int | None
) -> None:
    documents = intervals_of(lengths)
    document_of = {i: at for at, (lo, hi) in enumerate(documents) for i in range(lo, hi)}

    def attends(i: int, j: int) -> bool:
        is_near = nearest is None or i - j >= nearest
        return (
            i in document_of
            and document_of[i] == document_of[j]
            and is_near
            and (farthest is None or i - j <= farthest)
        )

    expected = tuple(sum(attends(i, j) for i in own for j in document_of) for own in all_indices(queries))
    assert pairs_by_rank(queries, documents, nearest, farthest) == expected


def test_imbalance() -> None:
    assert imbalance([3, 5, 4]) == 0.25
    assert imbalance([4, 4]) == imbalance([0, 0]) == 0


def random_lengths(total: int, num: int, seed: int) -> list[int]:
    cuts = sorted(random.Random(seed).sample(range(1, total), num - 1))
    return [hi - lo for lo, hi in pairwise([0, *cuts, total])]


@pytest.mark.parametrize(("total", "num_ranks"), [(8192, 4), (8000, 4), (32_768, 4), (131_072, 2), (131_072, 8)])
def test_stripes_balance_packed_documents(total: int, num_ranks: int) -> None:
    """Eight documents of random lengths: at most 10% over the mean in every draw, where other layouts are far off."""
    found: dict[str, list[float]] = {}
    for seed in range(30):
        lengths = random_lengths(total, 8, seed)
        for layout in (Partition.striped, Partition.zigzag, Partition.contiguous):
            pairs = pairs_by_rank(layout(total, num_ranks), intervals_of(lengths), nearest=0)
            assert sum(pairs) == sum(x * (x + 1) // 2 for x in lengths)
            found.setdefault(layout.__name__, []).append(imbalance(pairs))
    assert max(found["striped"]) <= 0.1
    for other in ("zigzag", "contiguous"):
        assert sum(found[other]) / len(found[other]) > 0.2


def test_smaller_blocks_balance_more() -> None:
    lengths = intervals_of([512] * 16)
    found = [imbalance(pairs_by_rank(Partition.striped(8192, 4, block), lengths, nearest=0)) for block in (128, 32, 8)]
    assert found == sorted(found, reverse=True) and found[0] > 0.4 and found[-1] < 0.1


@pytest.mark.parametrize("given_", [None, [3, 4], (3,), [[3, 4], (7,)]], ids=str)
def test_documents_are_lengths_of_one_row_or_of_several(given_: Any) -> None:
    expected = {"None": None, "[3, 4]": ((3, 4),), "(3,)": ((3,),), "[[3, 4], (7,)]": ((3, 4), (7,))}
    assert checked_documents(given_) == expected[str(given_)]


@pytest.mark.parametrize("wrong", [[], 8, "8", [0], [3, -1], [3.0], [True], [[3], []], [[3], 4], [["3"]]], ids=str)
def test_other_documents_are_refused(wrong: Any) -> None:
    with pytest.raises(UsageError, match="documents are the lengths"):
        checked_documents(wrong)
