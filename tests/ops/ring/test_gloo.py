"""The op on real ranks, eager and compiled, and what simulated ones make of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sptransform.ops.communication.slicing import assemble
from sptransform.ops.simulation import register
from sptransform.sharding.mesh import PRETENDED_GROUP
from sptransform.sharding.partition import Partition
from sptransform.testing.lockstep import in_lockstep
from tests.ops.ring.ranks import Problem, Ring, Run, assert_equal, one_device, visible
from tests.support.gloo_pool import get_pool
from tests.support.simulated import from_ranks, per_rank, simulate

pytestmark = pytest.mark.timeout(120)
SIZE = 22


def differentiate(group: str, ring: Ring, args: list[Any], grad: Tensor, compiled: bool) -> list[Tensor]:
    """Result and gradients on one rank."""
    *xs, rows, columns = args
    xs = [x.detach().clone().requires_grad_() for x in xs]
    options = {**ring.keywords, "group_name": group}

    def run(*xs: Tensor) -> Tensor:
        return torch.ops.sptransform.ring_attention(*xs, rows, columns, **options)[0]

    out = (torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run)(*xs)
    return [out.detach(), *torch.autograd.grad(out, xs, grad)]


def on_rank(rank: int, world_size: int, ring: Ring, problem: Problem, compiled: bool) -> list[Tensor]:
    args, grad = ring.own(problem, rank), ring.backward_arguments(problem, rank, ())[0]
    return differentiate(dist.group.WORLD.group_name, ring, args, grad, compiled)


def together(ring: Ring, found: list[list[Tensor]]) -> Run:
    out, query, key, value = zip(*found, strict=True)
    whole = [assemble(out, 2, ring.queries), assemble(query, 2, ring.queries)]
    return whole[0], [whole[1], *(assemble(x, 2, ring.keys) for x in (key, value))]


def case(num_ranks: int, size: int = SIZE) -> tuple[Ring, Problem, Run]:
    """Documents under a causal mask, in zigzag."""
    partition = Partition.zigzag(size, num_ranks)
    documents = torch.arange(size) // 9
    options = {"nearest": 0, "mask": "%2 = eq.Tensor(%0, %1)"}
    ring = Ring(partition, partition, (documents[:, None],), (documents[None],), options)
    problem = Problem.random(size)
    mask = visible(size, size, 0, None) & (documents[:, None] == documents)
    return ring, problem, one_device(problem, mask)


@pytest.mark.parametrize(("num_ranks", "compiled"), [(2, True), (3, False)])
def test_real_ranks(num_ranks: int, compiled: bool) -> None:
    ring, problem, expected = case(num_ranks)
    found = get_pool(num_ranks).run(on_rank, ring, problem, compiled, timeout=60)
    assert_equal(together(ring, found), expected)


def test_ranks_in_lockstep() -> None:
    """Uneven shares: every rank runs a graph of its own."""
    ring, problem, expected = case(3)

    def run(rank: int) -> list[Tensor]:
        args, grad = ring.own(problem, rank), ring.backward_arguments(problem, rank, ())[0]
        return differentiate(PRETENDED_GROUP, ring, args, grad, compiled=False)

    assert_equal(together(ring, in_lockstep(3, run)), expected)


def test_simulated_ranks() -> None:
    """``LocalTensorMode`` runs one graph for all ranks, and operands that are the same everywhere are plain tensors."""
    ring, problem, expected = case(4, 24)
    args = [ring.own(problem, rank) for rank in range(4)]
    grads = [ring.backward_arguments(problem, rank, ())[0] for rank in range(4)]
    register()
    with simulate(4):
        xs = [from_ranks(lambda rank, i=i: args[rank][i], 4, requires_grad=True) for i in range(3)]
        rows = [from_ranks(lambda rank: args[rank][3][0], 4)]
        options = {**ring.keywords, "group_name": dist.group.WORLD.group_name}
        out = torch.ops.sptransform.ring_attention(*xs, rows, list(ring.columns), **options)[0]
        (out * from_ranks(lambda rank: grads[rank], 4)).sum().backward()
        found = [per_rank(x) for x in (out, *(x.grad for x in xs))]
    assert_equal(together(ring, [list(own) for own in zip(*found, strict=True)]), expected)


def test_simulated_subgroups() -> None:
    """Two rings of two ranks each: ranks 0 and 1, and ranks 2 and 3."""
    partition = Partition.zigzag(16, 2)
    ring = Ring(partition, partition, options={"nearest": 0})
    problems = [Problem.random(16, seed=seed) for seed in (1, 2)]
    args = [ring.own(problems[rank // 2], rank % 2) for rank in range(4)]
    register()
    with simulate(4):
        options = {**ring.keywords, "group_name": dist.new_group([0, 1]).group_name}
        xs = [from_ranks(lambda rank, i=i: args[rank][i], 4) for i in range(3)]
        outs = per_rank(torch.ops.sptransform.ring_attention(*xs, [], [], **options)[0])
    for i, problem in enumerate(problems):
        expected = one_device(problem, visible(16, 16, 0, None))[0]
        torch.testing.assert_close(assemble(outs[2 * i : 2 * i + 2], 2, partition), expected, atol=1e-12, rtol=1e-12)
