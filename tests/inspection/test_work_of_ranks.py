"""The work of every rank that `explain` shows: of every strategy the pairs that exist, shared as it lays them out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import sptransform
from sptransform import USP, AllGatherKV, MegatronSP, Ring, Strategy, Ulysses, UsageError
from sptransform.inspection.attended_work import intervals_of, pairs_by_rank
from sptransform.inspection.pages import ranks_text
from sptransform.sharding.partition import Partition

BATCH, HEADS, LENGTH = 2, 6, 48
DOCUMENTS = ((5, 20, 1, 22), (48,))
DENSE, CAUSAL = "dense", "causal"


class Attention(nn.Module):
    """One attention of inputs that are heads already; ``kind`` says what its mask is."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.project = nn.Linear(4, 4)

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        x = self.project(x)
        mask, length = None, x.shape[2]
        if self.kind == "window":
            at = torch.arange(length)
            mask = (at[:, None] >= at) & (at[:, None] - at < 7)
        elif self.kind == "ordered":
            mask = numbers[:, None, :, None] >= numbers[:, None, None, :]
        elif self.kind == "numbered":
            at = numbers.long().cumsum(1)
            same = numbers[:, None, :, None] == numbers[:, None, None, :]
            mask = same & (at[:, None, :, None] - at[:, None, None, :] > 2)
        elif self.kind == "chunked":
            mask = (torch.arange(length) // 7)[:, None] == torch.arange(length) // 7
        elif self.kind == "padded":
            mask = (numbers > 0)[:, None, None]
        elif self.kind == "shorter keys":
            return functional.scaled_dot_product_attention(x, x[:, :, :9], x[:, :, :9]).sum()
        return functional.scaled_dot_product_attention(x, x, x, mask, is_causal=self.kind == CAUSAL).sum()


def explained(kind: str, strategy: Any, world_size: Any, **options: Any) -> sptransform.Explanation:
    inputs = torch.ones(BATCH, HEADS, LENGTH, 4), torch.ones(BATCH, LENGTH)
    return sptransform.explain(Attention(kind), strategy, inputs, world_size=world_size, **options)


STRATEGIES: list[tuple[Any, Any]] = [
    (Ring("striped", block=4), 4),
    (Ring(), 3),
    (AllGatherKV("contiguous"), 5),
    (Ulysses(), 4),
    (Ulysses("batch"), 2),
    (USP(2, 2, "striped", block=3), 4),
    (USP(2, 2), 4),
    (MegatronSP(), 4),
    (("ring", "megatron"), (2, 2)),
    (("ulysses", "megatron"), (3, 2)),
]


@pytest.mark.parametrize(("strategy", "world_size"), STRATEGIES, ids=str)
def test_ranks_share_the_pairs_that_exist(strategy: Any, world_size: Any) -> None:
    explanation = explained(CAUSAL, strategy, world_size, documents=DOCUMENTS)
    (work,) = explanation.attention
    assert len(work.pairs) == explanation.world_size and not work.is_bound
    assert sum(work.pairs) == HEADS * sum(x * (x + 1) // 2 for row in DOCUMENTS for x in row)
    assert explanation.attended_pairs == work.pairs


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        # queries: by what a rank owns
        (Ring("striped", block=4), [pairs_by_rank(Partition.striped(LENGTH, 4, 4), ((0, LENGTH),), 0), HEADS * BATCH]),
        # heads: 2, 1, 2, 1 of 6 on 4 ranks
        (Ulysses(), [(1, 2, 1, 2), BATCH * LENGTH * (LENGTH + 1) // 2]),
        # ring x heads: ranks that share heads have the queries of one rank of the ring
        (USP(2, 2), [[x for x in (1, 1) for _ in range(2)], BATCH * HEADS * LENGTH * (LENGTH + 1) // 8]),
        (USP(2, 2, "contiguous"), [[x for x in (300, 876) for _ in range(2)], BATCH * HEADS // 2]),
    ],
    ids=str,
)
def test_shares(strategy: Strategy, expected: list[Any]) -> None:
    shares, each = expected
    (work,) = explained(CAUSAL, strategy, 4).attention
    assert list(work.pairs) == [share * each for share in shares]


def test_rows_are_shared_by_a_cut_batch() -> None:
    (work,) = explained(CAUSAL, Ulysses("batch"), 2, documents=DOCUMENTS).attention
    assert list(work.pairs) == [HEADS * sum(x * (x + 1) // 2 for x in row) for row in DOCUMENTS]


@pytest.mark.parametrize(
    ("kind", "documents", "of_row", "is_bound"),
    [
        (DENSE, None, LENGTH**2, False),
        (DENSE, [20, 20], 2 * 20**2, False),
        ("window", None, sum(min(i + 1, 7) for i in range(LENGTH)), False),
        ("window", [5, 43], 15 + sum(min(i + 1, 7) for i in range(43)), False),
        ("ordered", None, LENGTH**2, True),
        ("ordered", [5, 43], 15 + 43 * 44 // 2, False),
        ("numbered", [5, 43], 3 + 41 * 40 // 2, False),
        ("padded", [5, 43], 5**2 + 43**2, True),
        ("chunked", [5, 43], 5**2 + 43**2, True),  # its equal numbers are not those of documents
        ("shorter keys", None, LENGTH * 9, False),
        ("shorter keys", [5, 43], LENGTH * 9, False),  # they are of another sequence
    ],
)
def test_masks(kind: str, documents: list[int] | None, of_row: int, is_bound: bool) -> None:
    for strategy in (Ring("striped"), Ulysses()):
        (work,) = explained(kind, strategy, 2, documents=documents).attention
        assert (sum(work.pairs), work.is_bound) == (BATCH * HEADS * of_row, is_bound)


def test_it_is_on_the_page_and_in_the_dict() -> None:
    explanation = explained(CAUSAL, Ring("contiguous"), 4, documents=[24, 24])
    (entry,) = explanation.to_dict()["attention"]
    pairs = pairs_by_rank(Partition.contiguous(LENGTH, 4), intervals_of([24, 24]), 0)
    assert entry["pairs"] == [BATCH * HEADS * x for x in pairs] == [936, 2664, 936, 2664]
    assert entry["imbalance"] == pytest.approx(0.48)
    assert explanation.to_dict()["documents"] == [[24, 24]]
    page = str(explanation)
    assert "Attention of packed documents" in page and "The busiest rank has 48.0% more than the mean." in page
    lines = [line.split() for line in page.splitlines()]
    assert ["1,", "3", "2,664", "+48.0%"] in lines
    assert ["0..3", "3,528", "+0.0%"] in [line.split() for line in str(explained(CAUSAL, Ring(), 4)).splitlines()]
    assert "Masks that depend on data may hide some of them." in str(explained("padded", Ring(), 4))


@pytest.mark.parametrize(
    ("documents", "message"),
    [([40, 9], "longer than the sequence"), ([[48]] * 3, "of all rows"), ([48, 0], "are the lengths")],
    ids=str,
)
def test_documents_that_do_not_fit_are_refused(documents: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        explained(CAUSAL, "ring", 2, documents=documents)


def test_one_rank_does_all() -> None:
    assert explained(CAUSAL, "ring", 1, documents=[48]).attended_pairs == ()


@pytest.mark.parametrize(
    "ranks, text",
    [
        ([3], "3"),
        ([0, 1, 2, 3], "0..3"),
        ([0, 2], "0, 2"),
        (list(range(1, 64, 2)), "1, 3 .. 63"),
        ([0, 1, 4, 5], "0..1, 4..5"),
        ([r for r in range(64) if r % 8 < 2], "0..1, 8..9 .. 56..57 (16 ranks)"),
    ],
)
def test_ranks_of_equal_work_share_a_line(ranks: list[int], text: str) -> None:
    assert ranks_text(ranks) == text
