"""Softmax along a dimension of which each rank has a part: what torch gives on one device, cut. Real ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import sptransform.ops  # noqa: F401 - registers the ops named here
from sptransform.op_rules import DEFAULT_RULES
from sptransform.op_rules.reduction import _JOINED
from sptransform.ops.local_slice import local_slice_for
from sptransform.rules.decision import Sharded
from sptransform.rules.rule import OpCall, Operand
from sptransform.rules.table import Local, Sent
from sptransform.sharding.partition import Partition
from sptransform.sharding.placement import Shard
from tests.support.brute_force import emit, partitions, randn
from tests.support.gloo_pool import get_pool
from tests.support.simulated import from_ranks, per_rank, simulate

aten, sp = torch.ops.aten, torch.ops.sptransform
pytestmark = pytest.mark.timeout(120)
SIZE = 6


def call_of(name: str, x: Tensor, dim: int, last: Any) -> tuple[OpCall, Tensor]:
    """The call and its result on one device."""
    target = getattr(getattr(aten, name.split(".")[0]), name.split(".")[1])
    y = target(x, dim, last)
    return OpCall(target, (Operand(0), dim, last), {}, (tuple(x.shape),), (tuple(y.shape),)), y


def on_rank(
    rank: int, world_size: int, name: str, x: Tensor, grad: Tensor, dim: int, last: Any, cuts: list[Partition]
) -> list[tuple[Tensor, Tensor]]:
    """What a worker does: its part of the result and of the gradient, for each way to cut ``dim``."""
    call, whole = call_of(name, x, dim, last)
    rule = DEFAULT_RULES.rule_of(call)
    factor = f"i{dim % x.ndim}"
    found = []
    for partition in cuts:
        shard = Shard(dim % x.ndim, partition)
        own = local_slice_for(x, shard, rank).requires_grad_()
        group = dist.group.WORLD.group_name
        local = Local(emit, (own,), ((),), ((),), (whole.dtype,), rule, Sharded(factor, partition), rank, group)
        y = DEFAULT_RULES[call.target].localize(call, local)
        (of_x,) = torch.autograd.grad(y, own, local_slice_for(grad, shard, rank))
        found.append((y.detach(), of_x))
    return found


def compared(name: str, x: Tensor, dim: int, last: Any, num_ranks: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each rank's part of the result and of the gradient, and what one device has there.

    Over blocks, balanced and zigzag parts, and with a rank that has nothing.
    """
    _, y = call_of(name, x, dim, last)
    # torch's logarithms of 16 bits are an approximation
    y = call_of(name, x.double(), dim, last)[1].to(y.dtype)
    grad = randn(*y.shape).to(y.dtype)
    backward = aten._log_softmax_backward_data if "log" in name else aten._softmax_backward_data
    of_x = backward(grad, y, dim, y.dtype).to(x.dtype)
    cuts = list(partitions(x.shape[dim], num_ranks))
    results = get_pool(num_ranks).run(on_rank, name, x, grad, dim, last, cuts, timeout=60)
    for at, partition in enumerate(cuts):
        shard = Shard(dim % x.ndim, partition)
        for rank, found in enumerate(results):
            for got, whole in zip(found[at], (y, of_x), strict=True):
                yield f"rank {rank} of {partition}", got, local_slice_for(whole, shard, rank)


def check(name: str, x: Tensor, dim: int, last: Any, num_ranks: int, tolerance: float) -> None:
    for what, got, expected in compared(name, x, dim, last, num_ranks):
        torch.testing.assert_close(
            got, expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m, what=what: f"{what}: {m}"
        )


NAMES = {"_log_softmax.default": False, "_softmax.default": False, "log_softmax.int": None, "softmax.int": None}


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_equals_one_device(name: str, num_ranks: int) -> None:
    for shape, dim in (((4, SIZE), -1), ((SIZE,), 0), ((2, SIZE, 3), 1)):
        check(name, randn(*shape), dim, NAMES[name], num_ranks, 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_large_numbers_and_what_has_no_chance(name: str) -> None:
    """Only less the largest of all ranks do exponentials stay finite; a rank may have nothing but -inf, or all may."""
    x = randn(5, SIZE)
    x[0] = torch.tensor([1e4, -1e4, 0.0, 1e4, 5e3, 1e4 - 1.0])
    x[1, : SIZE // 2] = -torch.inf
    x[2, SIZE // 3 :] = -torch.inf
    x[3] = -torch.inf
    check(name, x, 1, NAMES[name], 3, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["log_softmax.int", "softmax.int"])
def test_sixteen_bits_are_summed_in_float32(name: str, dtype: torch.dtype) -> None:
    """The right bits, but for the few entries that two orders of summation round differently."""
    for what, got, expected in compared(name, randn(2, 3000).to(dtype), 1, None, 2):
        assert got.dtype == dtype
        assert (got != expected).double().mean() < 0.01 or not got.numel(), what


@pytest.mark.parametrize("name", ["log_softmax.int", "softmax.int"])
def test_converted_first(name: str) -> None:
    check(name, randn(4, SIZE).bfloat16(), 1, torch.float64, 3, 1e-2)
    check(name, randn(4, SIZE).float(), 1, torch.float64, 3, 1e-6)


@pytest.mark.parametrize("name", ["log_softmax", "softmax"])
def test_simulated_ranks_do_what_real_ones_do(name: str) -> None:
    x, grad = 1e4 * randn(4, SIZE), randn(4, SIZE)
    leaf = x.clone().requires_grad_()
    y = getattr(leaf, name)(1)
    (of_x,) = torch.autograd.grad(y, leaf, grad)
    shard = Shard(1, Partition.contiguous(SIZE, 2))
    with simulate(2):
        group = dist.group.WORLD.group_name
        xs = from_ranks(lambda rank: local_slice_for(x, shard, rank), 2, requires_grad=True)
        ys = getattr(sp, name)(xs, 1, torch.float64, 2, group)
        (ys * from_ranks(lambda rank: local_slice_for(grad, shard, rank), 2)).sum().backward()
        values, grads = per_rank(ys), per_rank(xs.grad)
    torch.testing.assert_close(torch.cat(values, 1), y.detach())
    torch.testing.assert_close(torch.cat(grads, 1), of_x)


def logsumexp_on_rank(
    rank: int, world_size: int, x: Tensor, grad: Tensor, dim: int, keepdim: bool, cuts: list[Partition]
) -> list[tuple[Tensor, Tensor]]:
    """For each way to cut ``dim``: the result, and this rank's part of the gradient."""
    found = []
    for partition in cuts:
        own = local_slice_for(x, Shard(dim % x.ndim, partition), rank).requires_grad_()
        y = sp.logsumexp(own, dim, keepdim, own.dtype, world_size, dist.group.WORLD.group_name)
        found.append((y.detach(), *torch.autograd.grad(y, own, grad)))
    return found


@pytest.mark.parametrize(("shape", "dim", "keepdim"), [((5, SIZE), -1, False), ((2, SIZE, 3), 1, True)])
def test_logsumexp_equals_one_device(shape: tuple[int, ...], dim: int, keepdim: bool) -> None:
    """Also of large numbers, and where a rank, or all, have nothing but -inf."""
    x = 1e3 * randn(*shape)
    x.view(-1)[: SIZE // 2] = -torch.inf
    x[-1] = -torch.inf
    x.requires_grad_()
    y = x.logsumexp(dim, keepdim)
    grad = randn(*y.shape)
    (of_x,) = torch.autograd.grad(y, x, grad)
    cuts = list(partitions(SIZE, 3))
    for rank, found in enumerate(get_pool(3).run(logsumexp_on_rank, x.detach(), grad, dim, keepdim, cuts, timeout=60)):
        for partition, (got, part) in zip(cuts, found, strict=True):
            torch.testing.assert_close(got, y.detach(), rtol=1e-12, atol=1e-12)
            expected = local_slice_for(of_x, Shard(dim % x.ndim, partition), rank)
            torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_what_is_sent() -> None:
    """Two all-reduces forward and one backward, of a number for each row, in the dtype of sums; 2 (N-1)/N of each."""
    for target in set(_JOINED.values()):
        for dtype, num_bytes in ((torch.bfloat16, 4), (torch.float32, 4), (torch.float64, 8)):
            call = OpCall(target, (Operand(0), -1, dtype, 4, "group"), {}, ((2, 10, 3),), ((2, 10, 3),))
            for own in (3, 0):
                sent = DEFAULT_RULES[target].sends(call, [torch.empty(2, 10, own)], 0)
                once = 2 * 20 * num_bytes * 3 // 4
                assert sent == (Sent("all_reduce", 2, 2 * once), Sent("all_reduce", 1, once))
