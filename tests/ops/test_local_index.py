"""Where a rank has the indices it is asked for."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import sptransform.ops  # noqa: F401 - registers the op
from sptransform.ops.groups import pretend
from sptransform.ops.local_index import local_index_for
from sptransform.ops.simulation import register
from sptransform.sharding.partition import Partition
from tests.sharding.test_partition import indices
from tests.support.brute_force import integers, partitions
from tests.support.simulated import per_rank, simulate, to_ranks

local_index = torch.ops.sptransform.local_index
SIZE = 7


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_positions_are_those_a_rank_stores_its_indices_at(num_ranks: int, dtype: torch.dtype) -> None:
    asked = torch.arange(SIZE, dtype=dtype)
    shared = Partition.of(SIZE, [[(0, 5)]] + [[(4, 7), (0, 1)]] * (num_ranks - 1))
    for partition in (*partitions(SIZE, num_ranks), shared):
        for rank in range(num_ranks):
            own = list(indices(partition, rank))
            found = local_index_for(asked, partition, rank)
            assert found.dtype == dtype
            assert found.tolist() == [own.index(i) if i in own else -1 for i in range(SIZE)]


@pytest.mark.parametrize("illegal", [-1, SIZE])
def test_an_index_that_no_rank_has(illegal: int) -> None:
    """Is an error on all ranks, as on one device."""
    index = torch.tensor([[0, illegal]])
    with pytest.raises(IndexError, match="out of range"):
        torch.nn.functional.embedding(index, torch.ones(SIZE, 2))
    for rank in range(2):
        with pytest.raises(IndexError, match="out of range"), pretend("group", rank):
            local_index(index, f"{SIZE}[0:4|4:7]", "group")


def test_simulated_ranks() -> None:
    register()
    index = integers(8, 2, 3)
    with simulate(4):
        found = per_rank(local_index(to_ranks(index, 4), "8/4z", dist.group.WORLD.group_name))
    for rank, own in enumerate(found):
        assert torch.equal(own, local_index_for(index, Partition.zigzag(8, 4), rank))
