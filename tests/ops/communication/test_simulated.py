"""Every change of placement on simulated ranks: values, gradients, and moves that undo one another.

Here every rank does the same; what differs between ranks is in ``tests/ops/communication/test_gloo.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sptransform.ops.communication import all_to_all, collectives
from sptransform.ops.local_slice import local_slice_for
from sptransform.ops.simulation import register
from sptransform.sharding.partition import Partition
from sptransform.sharding.placement import Shard
from tests.support.brute_force import randn
from tests.support.redistributes import EVEN, Change, PerRank, apply, check
from tests.support.simulated import from_ranks, per_rank, simulate, to_ranks

NUM_RANKS = 4
pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module", autouse=True)
def _ops_know_the_simulation() -> Iterator[None]:
    register()
    yield


def simulated(name: str, arguments: tuple[Any, ...], inputs: PerRank, cotangents: PerRank) -> tuple[PerRank, PerRank]:
    """Outputs and gradients of the op on all ranks at once."""
    with simulate(NUM_RANKS):
        xs = [_on_ranks(own, requires_grad=True) for own in zip(*inputs, strict=True)]
        ys = apply(name, arguments, xs)
        outputs = [per_rank(y) for y in ys]
        gs = [_on_ranks(own) for own in zip(*cotangents, strict=True)]
        sum((y * g).sum() for y, g in zip(ys, gs, strict=True)).backward()
        grads = [per_rank(x.grad) for x in xs]
    return _transposed(outputs), _transposed(grads)


def _on_ranks(values: tuple[Tensor, ...], *, requires_grad: bool = False) -> Tensor:
    return from_ranks(lambda rank: values[rank], NUM_RANKS, requires_grad=requires_grad)


def _transposed(by_tensor: list[list[Tensor]]) -> PerRank:
    return [list(own) for own in zip(*by_tensor, strict=True)]


@pytest.mark.parametrize("changed", EVEN, ids=str)
def test_change_of_placement(changed: Change) -> None:
    check(changed, NUM_RANKS, simulated)


def test_replicated_to_pending_goes_through_invariant() -> None:
    """R -> I -> P: both the value and the gradient are then on the first rank only."""
    x, cotangent = randn(2, 3), randn(2, 3)
    with simulate(NUM_RANKS):
        group = dist.group.WORLD.group_name
        xs = to_ranks(x, NUM_RANKS, requires_grad=True)
        invariant = torch.ops.sptransform.first_rank(xs, group, False)
        pending = torch.ops.sptransform.first_rank(invariant, group, True)
        values = per_rank(pending)
        (pending * to_ranks(cotangent, NUM_RANKS)).sum().backward()
        grads = per_rank(xs.grad)
    torch.testing.assert_close(sum(values), x)
    torch.testing.assert_close(sum(grads), cotangent)


_BOTH_WAYS = [
    ((2, 8, 4), Shard(1, Partition.contiguous(8, 4)), Shard(2, Partition.contiguous(4, 4))),
    ((24, 8), Shard(0, Partition.contiguous(8, 4), 3), Shard(1, Partition.contiguous(4, 4), 2)),
    (
        (2, 8, 4),
        Shard(1, Partition.of(8, [[(r, r + 1), (7 - r, 8 - r)] for r in range(4)])),
        Shard(2, Partition.contiguous(4, 4)),
    ),
]


@pytest.mark.parametrize(("shape", "source", "target"), _BOTH_WAYS, ids=["blocks", "outer", "zigzag"])
def test_an_exchange_and_back(shape: tuple[int, ...], source: Shard, target: Shard) -> None:
    x = randn(*shape)
    parts = [local_slice_for(x, source, rank) for rank in range(NUM_RANKS)]
    with simulate(NUM_RANKS):
        group = dist.group.WORLD.group_name
        (moved,) = all_to_all.exchange([_on_ranks(tuple(parts))], [source], [target], group)
        (back,) = all_to_all.exchange([moved], [target], [source], group)
        there, again = per_rank(moved), per_rank(back)
    for rank in range(NUM_RANKS):
        assert torch.equal(there[rank], local_slice_for(x, target, rank))
        assert torch.equal(again[rank], parts[rank])


def test_a_shared_head_comes_back_as_a_sum() -> None:
    """The way back of key heads that several ranks hold: what each of them has is added up."""
    source, target = Shard(1, Partition.contiguous(8, 4)), Shard(2, Partition.contiguous(4, 4).quotient(2))
    held = [randn(2, 8, 1) for _ in range(NUM_RANKS)]
    with simulate(NUM_RANKS):
        (back,) = all_to_all.exchange([_on_ranks(tuple(held))], [target], [source], dist.group.WORLD.group_name)
        got = per_rank(back)
    whole = torch.cat([held[0] + held[1], held[2] + held[3]], 2)
    for rank in range(NUM_RANKS):
        torch.testing.assert_close(got[rank], local_slice_for(whole, source, rank))


def test_gradients_of_several_dtypes_are_summed_apart() -> None:
    values = [randn(3), randn(2, 2).float(), randn(4).float()]
    cotangents = [[randn(*x.shape).to(x.dtype) for x in values] for _ in range(NUM_RANKS)]
    inputs = [list(values) for _ in range(NUM_RANKS)]
    outputs, grads = simulated("replicate", ("group",), inputs, cotangents)
    for rank in range(NUM_RANKS):
        for index, x in enumerate(values):
            assert torch.equal(outputs[rank][index], x)
            assert grads[rank][index].dtype == x.dtype
            torch.testing.assert_close(grads[rank][index], sum(own[index] for own in cotangents))


def test_what_cannot_be_moved_is_refused() -> None:
    shard = Shard(1, Partition.contiguous(8, 4))
    other = Shard(1, Partition.contiguous(4, 4), outer=2)
    with pytest.raises(ValueError, match="moves between dimensions"):
        all_to_all.exchange([randn(2, 2)], [shard], [other], "group")
    heads = Shard(0, Partition.contiguous(4, 4))
    with pytest.raises(AssertionError, match="one dtype"):
        all_to_all.exchange([randn(4, 2), randn(4, 2).float()], [shard, shard], [heads, heads], "group")
    with pytest.raises(TypeError, match="boolean"):
        collectives.all_reduce(torch.ones(2, dtype=torch.bool), "group")
