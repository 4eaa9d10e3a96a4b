"""Errors against float64, compared with those of torch's attention in the same dtype on one device."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from sptransform.sharding.partition import Partition
from tests.ops.ring.ranks import Problem, Ring, Run, one_device, visible

SIZE = 128


def _errors(found: Run, exact: Run) -> list[float]:
    """Of the result and the three gradients, relative, as root mean squares."""

    def error(x: Tensor, y: Tensor) -> float:
        return float(((x.double() - y).square().mean() / y.square().mean()).sqrt())

    return [error(x, y) for x, y in zip((found[0], *found[1]), (exact[0], *exact[1]), strict=True)]


@cache
def errors(dtype: torch.dtype, causal: bool, num_ranks: int) -> list[float]:
    """``num_ranks`` 0 is one device."""
    problem = Problem.random(SIZE, dim=32, dtype=dtype)
    mask = visible(SIZE, SIZE, 0, None) if causal else None
    exact = one_device(problem.to(torch.float64), mask)
    if num_ranks == 0:
        return _errors(one_device(problem, mask), exact)
    form = Partition.zigzag if causal else Partition.contiguous
    partition = form(SIZE, num_ranks)
    return _errors(Ring(partition, partition, options={"nearest": 0} if causal else {}).run(problem), exact)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_one_device(dtype: torch.dtype, causal: bool) -> None:
    alone = errors(dtype, causal, 0)
    for num_ranks in (2, 4, 8):
        ratios = [x / y for x, y in zip(errors(dtype, causal, num_ranks), alone, strict=True)]
        assert max(ratios) <= 1.2, (num_ranks, ratios)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_do_not_grow_with_the_ranks(dtype: torch.dtype) -> None:
    for causal in (True, False):
        few, many = errors(dtype, causal, 2), errors(dtype, causal, 8)
        assert all(y <= 1.2 * x for x, y in zip(few, many, strict=True)), (few, many)
