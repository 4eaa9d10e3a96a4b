"""Slice a replicated tensor to this rank's part, and the transpose. These ops read the rank at run time."""

from __future__ import annotations

import torch
from torch import Tensor

from sptransform.ops.communication.slicing import conceal, expose, select
from sptransform.ops.groups import rank_in
from sptransform.ops.library import primitive
from sptransform.sharding.placement import Shard


def local_slice_for(x: Tensor, shard: Shard, rank: int) -> Tensor:
    """Rank's part of the full tensor ``x``; always a copy."""
    full, dim = expose(x, shard)
    return conceal(select(full, dim, shard.partition.owned[rank]).clone(memory_format=torch.contiguous_format), shard)


def embed_for(x: Tensor, shard: Shard, rank: int) -> Tensor:
    """The full tensor, zero outside of rank's part ``x``: the transpose of :func:`local_slice_for`."""
    part, dim = expose(x, shard)
    shape = list(part.shape)
    shape[dim] = shard.partition.size
    full = part.new_zeros(shape)
    at = 0
    for lo, hi in shard.partition.owned[rank]:
        full.narrow(dim, lo, hi - lo).copy_(part.narrow(dim, at, hi - lo))
        at += hi - lo
    return conceal(full, shard)


def first_rank_for(x: Tensor, rank: int) -> Tensor:
    """``x`` on rank 0, zeros elsewhere: a pending sum whose value is ``x``."""
    return x.clone() if rank == 0 else torch.zeros_like(x)


def _local_size(shard: Shard, group: str) -> int:
    # do not read the rank for an even partition: tracing with fake tensors has no rank
    return shard.local_dim_size(0 if shard.partition.is_even else rank_in(group))


def _fake_local_slice(x: Tensor, spec: str, group: str) -> Tensor:
    shard = Shard.parse(spec, full=x)
    return x.new_empty([*x.shape[: shard.dim], _local_size(shard, group), *x.shape[shard.dim + 1 :]])


def _fake_embed_in_zeros(x: Tensor, spec: str, group: str) -> Tensor:
    shard = Shard.parse(spec, part=x)
    return x.new_empty([*x.shape[: shard.dim], shard.dim_size, *x.shape[shard.dim + 1 :]])


@primitive("local_slice(Tensor x, str spec, str group_name) -> Tensor", fake=_fake_local_slice)
def local_slice(x: Tensor, spec: str, group_name: str) -> Tensor:
    return local_slice_for(x, Shard.parse(spec, full=x), rank_in(group_name))


@primitive("embed_in_zeros(Tensor x, str spec, str group_name) -> Tensor", fake=_fake_embed_in_zeros)
def embed_in_zeros(x: Tensor, spec: str, group_name: str) -> Tensor:
    return embed_for(x, Shard.parse(spec, part=x), rank_in(group_name))


@primitive("on_first_rank(Tensor x, str group_name) -> Tensor", fake=lambda x, group_name: torch.empty_like(x))
def on_first_rank(x: Tensor, group_name: str) -> Tensor:
    return first_rank_for(x, rank_in(group_name))
