"""Cutting tensors and putting them together, on plain tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sptransform.ops.communication.slicing import assemble, conceal, expose, select
from sptransform.ops.local_slice import embed_for, first_rank_for, local_slice_for
from sptransform.sharding.partition import Partition
from sptransform.sharding.placement import Shard
from tests.sharding.test_partition import exact_partitions, indices, partitions
from tests.support.brute_force import randn, together

fast = settings(deadline=None, derandomize=True, max_examples=80)


@st.composite
def shards(draw: st.DrawFn, exact: bool) -> tuple[Shard, Tensor]:
    """A shard, and a whole tensor that it cuts."""
    partition = draw(exact_partitions(8) if exact else partitions())
    shard = Shard(draw(st.integers(0, 2)), partition, draw(st.sampled_from([1, 1, 2, 3])))
    shape = [2, 3, 2]
    shape[shard.dim] = shard.dim_size
    return shard, randn(*shape)


def taken(x: Tensor, shard: Shard, rank: int) -> Tensor:
    """``local_slice_for`` by indices one by one."""
    size = shard.partition.size
    own = [outer * size + i for outer in range(shard.outer) for i in indices(shard.partition, rank)]
    return x.index_select(shard.dim, torch.tensor(own, dtype=torch.int64))


@fast
@given(shards(exact=False))
def test_take(case: tuple[Shard, Tensor]) -> None:
    shard, x = case
    for rank in range(shard.partition.num_ranks):
        part = local_slice_for(x, shard, rank)
        assert torch.equal(part, taken(x, shard, rank))
        assert part.shape == shard.local_shape(tuple(x.shape), rank)
        assert (part.is_contiguous() and part.data_ptr() != x.data_ptr()) or part.numel() == 0


@fast
@given(shards(exact=True))
def test_place_is_the_transpose_of_take(case: tuple[Shard, Tensor]) -> None:
    """For all x and g: <take(x), g> = <x, place(g)>."""
    shard, x = case
    for rank in range(shard.partition.num_ranks):
        part = local_slice_for(x, shard, rank)
        g = randn(*part.shape)
        torch.testing.assert_close((part * g).sum(), (x * embed_for(g, shard, rank)).sum())


@fast
@given(shards(exact=True))
def test_parts_make_the_whole(case: tuple[Shard, Tensor]) -> None:
    shard, x = case
    ranks = range(shard.partition.num_ranks)
    assert torch.equal(together([local_slice_for(x, shard, rank) for rank in ranks], shard), x)
    assert torch.equal(sum(embed_for(local_slice_for(x, shard, rank), shard, rank) for rank in ranks), x)


@fast
@given(shards(exact=False))
def test_assemble_sums_over_owners(case: tuple[Shard, Tensor]) -> None:
    shard, x = case
    exposed, dim = expose(x, shard)
    counts = torch.zeros(shard.partition.size, dtype=x.dtype)
    for rank in range(shard.partition.num_ranks):
        for i in indices(shard.partition, rank):
            counts[i] += 1
    parts = [select(exposed, dim, own) for own in shard.partition.owned]
    weights = counts.reshape(-1, *[1] * (exposed.dim() - dim - 1))
    torch.testing.assert_close(assemble(parts, dim, shard.partition), exposed * weights)


def test_expose_and_conceal_are_views_of_one_another() -> None:
    shard = Shard(1, Partition.contiguous(4, 2), outer=3)
    x = randn(2, 12, 5)
    exposed, dim = expose(x, shard)
    assert exposed.shape == (2, 3, 4, 5) and dim == 2
    assert torch.equal(conceal(exposed, shard), x)
    plain = Shard(1, Partition.contiguous(12, 2))
    assert expose(x, plain)[0] is x and conceal(x, plain) is x


@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 6, 3), (2, 6, 0)])
def test_expose_of_nothing(shape: tuple[int, ...]) -> None:
    """A rank that owns no index, and a tensor without entries."""
    shard = Shard(1, Partition.of(3, [[], [(0, 3)]]), outer=2)
    exposed, _ = expose(torch.empty(shape), shard)
    assert exposed.shape == (shape[0], 2, shape[1] // 2, shape[2])
    assert conceal(exposed, shard).shape == shape


def test_first_rank() -> None:
    x = randn(3)
    assert torch.equal(first_rank_for(x, 0), x)
    assert torch.equal(first_rank_for(x, 1), torch.zeros_like(x))
