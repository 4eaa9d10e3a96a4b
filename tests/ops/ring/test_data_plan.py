"""Calls planned from what a mask's operands hold: each visible pair once, no kernel for others, and equal results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sptransform.ops.mask_program import block_mask
from sptransform.ops.ring import data_plan
from sptransform.ops.ring.conditions import Bound, Conditions, read
from sptransform.ops.ring.data_plan import DataPlan
from sptransform.ops.ring.plan import Call
from sptransform.sharding.intervals import Intervals
from sptransform.sharding.partition import Partition
from tests.ops.ring.ranks import Problem, Ring, assert_equal, one_device, visible

SAME = "%2 = eq.Tensor(%0, %1)"
SAME_AND_SHOWN = "%3 = eq.Tensor(%0, %1); %4 = logical_and(%3, %2)"
# how Hugging Face writes packed documents with a window: queries have a position, that less the window, and a document
BY_POSITIONS = (
    "%5 = gt.Tensor(%3, %0); %6 = le.Tensor(%3, %1); %7 = logical_and(%5, %6); %8 = eq.Tensor(%2, %4); "
    "%9 = logical_and(%7, %8)"
)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is planned from now on, with pieces that are joined only if they are tiny."""
    found, plan = [], DataPlan.calls
    monkeypatch.setattr(data_plan, "SMALL", 3)
    monkeypatch.setattr(DataPlan, "calls", lambda self, keys: found.append(plan(self, keys)) or found[-1])
    return found


def documents(lengths: list[int], batch: int = 1) -> Tensor:
    """[batch, 1, 1, tokens]; each row of the batch has other documents."""
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return torch.stack([numbers.roll(3 * row) for row in range(batch)])[:, None, None]


def positions(lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None, None, None]


def problem_of(kind: str, lengths: list[int]) -> tuple[str, list[Tensor], list[Tensor]]:
    """A program and its operands, rows and columns."""
    same, at = documents(lengths), positions(lengths)
    if kind == "one batch":
        return SAME, [same.mT], [same]
    two = documents(lengths, 2)
    if kind == "documents of each row":
        return SAME, [two.mT], [two]
    shown = torch.ones(2, 1, 1, sum(lengths), dtype=torch.bool)
    shown[0, ..., :4] = shown[1, ..., -6:] = shown[1, ..., 10:11] = False
    if kind == "padding":
        return "%0", [], [shown]
    if kind == "padding and documents":
        return SAME_AND_SHOWN, [same.mT], [same, shown]
    if kind == "a condition that is not read":
        other = torch.rand(sum(lengths), sum(lengths), generator=torch.Generator().manual_seed(6)) > 0.4
        return "%3 = eq.Tensor(%0, %2); %4 = logical_and(%3, %1)", [same.mT, other[None, None]], [same]
    if kind == "a bias within documents":
        bias = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        program = "%3 = eq.Tensor(%0, %1); %4 = logical_not(%3); %5 = masked_fill.Scalar(%2, %4, -inf)"
        return program, [same.mT], [same, bias[None]]
    return BY_POSITIONS, [(at - 4).mT, at.mT, same.mT], [at, same]


def laid_out(layout: str, size: int, num_ranks: int) -> Partition:
    """Stripes of some tokens, since pieces of one are too many for a plan."""
    return Partition.striped(size, num_ranks, 5) if layout == "striped" else getattr(Partition, layout)(size, num_ranks)


KINDS = (
    "one batch",
    "documents of each row",
    "padding",
    "padding and documents",
    "a condition that is not read",
    "a bias within documents",
    "positions and a window",
)


def mask_of(program: str, rows: list[Tensor], columns: list[Tensor], limits: tuple[Any, Any]) -> Tensor:
    size = columns[0].shape[-1]
    mask, band = block_mask(program, rows, columns, 0, size, slice(0, size)), visible(size, size, *limits)
    return mask & band if mask.dtype == torch.bool else mask.masked_fill(~band, -torch.inf)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limits", [(None, None), (0, None), (-2, 6)])
@pytest.mark.parametrize(
    ("num_ranks", "layout", "circulates"),
    [(1, "contiguous", True), (3, "zigzag", True), (2, "contiguous", False)]
    + [pytest.param(2, "striped", True, marks=pytest.mark.slow)],
)
def test_results_and_gradients_are_those_of_one_device(
    kind: str, limits: tuple[Any, Any], num_ranks: int, layout: str, circulates: bool, planned: list[Any]
) -> None:
    """Values are larger than keys on one rank: the kernel for that has windows."""
    lengths = [1, 9, 5, 1, 1, 13, 7]
    program, rows, columns = problem_of(kind, lengths)
    problem = Problem.random(sum(lengths), value_dim=11 if num_ranks == 1 else None)
    expected = one_device(problem, mask_of(program, rows, columns, limits))
    partition = laid_out(layout, sum(lengths), num_ranks)
    options = {"mask": program, "nearest": limits[0], "farthest": limits[1]}
    found = Ring(partition, partition, tuple(rows), tuple(columns), options=options, circulates=circulates)
    assert_equal(found.run(problem), expected)
    assert planned and any(calls for calls in planned)


def covered(calls: tuple[Call, ...], size: int, num_keys: int, mask: Tensor) -> Tensor:
    """How often each pair is computed and not hidden; ``mask`` is what calls with a mask compute."""
    times = torch.zeros(len(mask), size, num_keys, dtype=torch.int64)
    for call in calls:
        rows = slice(*call.batch) if call.batch else slice(None)
        at = rows, slice(call.q_start, call.q_stop), slice(call.k_start, call.k_stop)
        seen = torch.ones_like(times[at], dtype=torch.bool)
        if call.kind == "causal":
            seen = seen.tril(seen.shape[-1] - seen.shape[-2])
        if call.sliding:
            seen = seen.triu()
        if not call.decided:
            seen = mask[at]
        times[at] += seen
    return times


def own(x: Tensor, dim: int, intervals: Intervals) -> Tensor:
    return torch.cat([x.narrow(dim, lo, hi - lo) for lo, hi in intervals], dim)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    kind=st.sampled_from([kind for kind in KINDS if kind != "a bias within documents"]),
    limits=st.sampled_from([(None, None), (0, None), (0, 5), (-3, 2)]),
    num_ranks=st.integers(1, 4),
    layout=st.sampled_from(["contiguous", "zigzag", "striped"]),
    most=st.sampled_from([1, 3, 64]),
    windows=st.booleans(),
)
def test_each_visible_pair_is_computed_once(
    lengths: list[int], kind: str, limits: tuple[Any, Any], num_ranks: int, layout: str, most: int, windows: bool
) -> None:
    program, rows, columns = problem_of(kind, lengths)
    size, whole = sum(lengths), mask_of(program, rows, columns, limits).flatten(0, -3)
    partition = laid_out(layout, size, num_ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_plan, "SMALL", most)
        for queries in filter(None, partition.owned):
            at = torch.cat([torch.arange(lo, hi) for lo, hi in queries])
            mine = [own(x, -2, queries) for x in rows]
            plan = DataPlan.of(program, (mine, columns, []), at, size, limits, windows)
            assert plan is not None
            for keys in filter(None, partition.owned):
                calls = plan.calls(keys)
                mask = own(own(whole, 1, queries), 2, keys)
                if calls is not None:
                    assert torch.equal(covered(calls, len(at), mask.shape[2], mask), mask.long())


def work(calls: tuple[Call, ...]) -> int:
    """The pairs that the kernels compute."""
    total = 0
    for call in calls:
        size, keys = call.q_stop - call.q_start, call.k_stop - call.k_start
        total += size * (size + 1) // 2 if call.kind == "causal" else size * keys
    return total


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["one batch", "positions"])
@pytest.mark.parametrize(("layout", "most"), [("zigzag", 40), ("striped", 80)])
def test_kernels_compute_the_pairs_that_exist(seed: int, kind: str, layout: str, most: int) -> None:
    """Eight documents of random lengths on four ranks: at most 5% more, where small pieces share a call."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randperm(8191, generator=generator)[:7].add(1).sort().values
    lengths = torch.diff(ends, prepend=torch.tensor([0]), append=torch.tensor([8192])).tolist()
    same, at = documents(lengths), positions(lengths)
    program, rows, columns, limits = SAME, [same.mT], [same], (0, None)
    if kind == "positions":
        program = "%4 = le.Tensor(%2, %0); %5 = eq.Tensor(%1, %3); %6 = logical_and(%4, %5)"
        rows, columns, limits = [at.mT, same.mT], [at, same], (None, None)
    partition = getattr(Partition, layout)(8192, 4)
    total = 0
    for queries in partition.owned:
        here = torch.cat([torch.arange(lo, hi) for lo, hi in queries])
        plan = DataPlan.of(program, ([own(x, -2, queries) for x in rows], columns, []), here, 8192, limits)
        for keys in partition.owned:
            calls = plan.calls(keys)
            assert len(calls) < most
            total += work(calls)
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    assert pairs <= total <= 1.05 * pairs


@pytest.mark.parametrize("subtracts", ["limits", "positions"])
def test_the_stripes_of_a_document_are_one_block_of_keys(subtracts: str) -> None:
    """One call for each piece of the queries, over all keys before it, and one more on the diagonal."""
    stripes = Partition.striped(8192, 4)
    same, at = documents([8192]), positions([8192])
    for rank, queries in enumerate(stripes.owned):
        here = torch.cat([torch.arange(lo, hi) for lo, hi in queries])
        if subtracts == "limits":
            plan = DataPlan.of(SAME, ([own(same.mT, -2, queries)], [same], []), here, 8192, (0, None))
        else:
            program = "%2 = le.Tensor(%1, %0)"
            plan = DataPlan.of(program, ([own(at.mT, -2, queries)], [at], []), here, 8192, (None, None))
        for block, keys in enumerate(stripes.owned):
            kinds = [call.kind for call in plan.calls(keys)]
            full = len(queries) - (block >= rank)  # the first piece sees none of later ranks, nor of its own before it
            assert sorted(kinds) == ["causal"] * (len(queries) if block == rank else 0) + ["full"] * full


def test_documents_of_one_token_share_calls() -> None:
    same = torch.arange(640)[None, None, None]
    plan = DataPlan.of(SAME, ([same.mT], [same], []), torch.arange(640), 640, (0, None))
    assert [(call.q_start, call.k_start, call.kind) for call in plan.calls(((0, 640),))] == [
        (start, start, "band") for start in range(0, 640, 64)
    ]


def test_pieces_without_end_are_no_plan() -> None:
    """Every second key is hidden: as many pieces of keys as half of the queries, for each piece of queries."""
    shown = (torch.arange(64) % 2 == 0)[None, None, None]
    same = (torch.arange(64) // 8)[None, None, None]
    plan = DataPlan.of(SAME_AND_SHOWN, ([same.mT % 2], [same % 2, shown], []), torch.arange(64), 64, (0, None))
    assert plan.calls(((0, 64),)) is None


INT64 = torch.iinfo(torch.int64)


@pytest.mark.parametrize(
    ("program", "at"),
    [
        ("%2 = sub.Tensor(%0, %1); %3 = le.Scalar(%2, 4)", torch.arange(12).to(torch.uint8)),
        ("%2 = sub.Tensor(%0, %1); %3 = le.Scalar(%2, 4)", torch.arange(-110, 130, 20).to(torch.int8)),
        ("%2 = sub.Tensor(%0, %1); %3 = lt.Scalar(%2, 128)", torch.arange(12).to(torch.int8)),
        ("%2 = sub.Tensor(%1, %0); %3 = eq.Scalar(%2, 2)", torch.tensor([INT64.min + 1, INT64.max] * 6)),
        ("%2 = le.Tensor(%1, %0)", torch.tensor([0, 1, 2, 3, INT64.min, INT64.min, 5, 6, INT64.max, INT64.min, 9, 0])),
    ],
)
def test_numbers_at_the_end_of_their_dtype(program: str, at: Tensor) -> None:
    """Differences begin again beyond it, as the program computes them."""
    problem, at = Problem.random(12), at[None, None, None]
    expected = one_device(problem, mask_of(program, [at.mT], [at], (None, None)))
    partition = Partition.zigzag(12, 2)
    assert_equal(Ring(partition, partition, (at.mT,), (at,), {"mask": program}).run(problem), expected)


def within(nearest: int | None, farthest: int | None, computed: bool = True) -> Conditions:
    return Conditions(bounds=(Bound(0, 1, nearest, farthest, computed),))


@pytest.mark.parametrize(
    ("program", "sides", "expected"),
    [
        (SAME, ("query", "key"), Conditions(same=((0, 1),))),
        ("%0", ("key",), Conditions(of_keys=(0,))),
        ("%0", ("both",), None),
        ("%2 = sub.Tensor(%0, %1); %3 = le.Scalar(%2, 4)", ("query", "key"), within(None, 4)),
        ("%2 = sub.Tensor(%1, %0); %3 = gt.Scalar(%2, -4)", ("query", "key"), within(None, 3)),
        ("%2 = sub.Tensor(%0, %1); %3 = eq.Scalar(%2, 4)", ("query", "key"), within(4, 4)),
        ("%2 = lt.Tensor(%1, %0)", ("query", "key"), within(1, None, computed=False)),
        ("%2 = logical_or(%0, %1)", ("query", "key"), None),
        ("%1 = gt.Scalar(%0, 0)", ("key",), Conditions(of_keys=(1,))),
    ],
)
def test_what_is_read(program: str, sides: tuple[Any, ...], expected: Conditions | None) -> None:
    assert read(program, sides) == expected


def test_a_row_is_merged_a_few_times_at_most() -> None:
    """Every second key is hidden from one long piece of queries; a few holes are no matter."""
    size = 2048
    for hidden, is_planned in ((torch.arange(0, size, 2), False), (torch.tensor([0, 700, 1500]), True)):
        shown = torch.ones(1, 1, 1, size, dtype=torch.bool)
        shown[..., hidden] = False
        plan = DataPlan.of("%0", ([], [shown], []), torch.arange(size), size, (None, None))
        assert (plan.calls(((0, size),)) is not None) == is_planned


@pytest.mark.parametrize("small", [None, 0])
@pytest.mark.parametrize("kind", ["blocks of numbers", "first keys"])
def test_numbers_that_do_not_go_on_by_one_are_no_plan(kind: str, small: int | None) -> None:
    """Every token is a segment of its own, which would meet all others, or be a call of its own."""
    at = torch.arange(1024)
    blocks, firsts = (at // 64)[None, None, None], (at // 100 * 100)[None, None, None]
    program, row, column = ("%2 = ge.Tensor(%0, %1)", blocks.mT, blocks)
    if kind == "first keys":
        program, row, column = "%2 = le.Tensor(%0, %1)", firsts.mT, at[None, None, None]
    plan = DataPlan.of(program, ([row], [column], []), at, 1024, (0, None), windows=small == 0, small=small)
    assert plan.calls(((0, 1024),)) is None
