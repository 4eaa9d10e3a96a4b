"""Functional collectives, and the sharded exchanges made of them.

Everything here works on plain tensors and knows nothing of gradients. AOTAutograd traces through it, so Inductor sees
the collectives it knows. For even partitions nothing depends on the rank.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from sptransform.ops.communication.complex_numbers import as_received, as_sent
from sptransform.ops.communication.slicing import by_rank, conceal, expose, in_order, pad_to
from sptransform.ops.groups import rank_in
from sptransform.sharding.placement import Shard

_c10d = torch.ops._c10d_functional


def all_reduce(x: Tensor, group: str, op: str = "sum") -> Tensor:
    """Sum, or another reduction, over the ranks."""
    if x.dtype == torch.bool:
        raise TypeError("a boolean cannot be summed over ranks")
    came = _c10d.wait_tensor(_c10d.all_reduce(as_sent(x), op, group))
    return as_received(came, x.is_complex())


def all_to_all(x: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
    """1-D exchange: ``sent[j]`` entries to rank j, ``received[i]`` from rank i."""
    came = _c10d.wait_tensor(_c10d.all_to_all_single(as_sent(x), received, sent, group))
    return as_received(came, x.is_complex())


def all_gather(x: Tensor, shard: Shard, group: str) -> Tensor:
    """Every rank's part -> the full tensor. Uneven parts are padded to the largest."""
    num_ranks = shard.partition.num_ranks
    if not shard.partition.is_blocks:
        return _in_full(_gathered(_part_in_front(x, shard), num_ranks, group), shard)
    x, dim = expose(x, shard)
    if not _is_first(x, dim):
        return conceal(torch.cat(_gathered(x, num_ranks, group).chunk(num_ranks), dim), shard)
    full = _gathered(x.flatten(0, dim), num_ranks, group)
    return conceal(full.view(*x.shape[:dim], *full.shape) if dim else full, shard)


def reduce_scatter(x: Tensor, shard: Shard, group: str) -> Tensor:
    """Pending sum of full tensors -> every rank's part of the sum."""
    num_ranks = shard.partition.num_ranks
    if not shard.partition.is_blocks:
        parts = by_rank(_in_front(x, shard), 0, shard.partition)
        return _own(_scattered(parts, num_ranks, group), shard, group)
    x, dim = expose(x, shard)
    if not _is_first(x, dim):
        return conceal(_scattered(torch.cat(x.chunk(num_ranks, dim)), num_ranks, group), shard)
    mine = _scattered(x.flatten(0, dim), num_ranks, group)
    return conceal(mine.view(*x.shape[:dim], *mine.shape) if dim else mine, shard)


def _is_first(x: Tensor, dim: int) -> bool:
    """Whether to treat the parts along ``dim`` as consecutive in memory, so that none is copied.

    The other form is chunks and their concatenation. With ``_micro_pipeline_tp``, Inductor fuses that form with
    adjacent matmuls (its ``micro_pipeline_tp.py``). It then copies nothing, and a sequence viewed as rows would hide
    the matmuls from this fusion.
    """
    return dim == 0 or (prod(x.shape[:dim]) == 1 and not _micro_pipelines())


def _micro_pipelines() -> bool:
    import torch._inductor.config as inductor  # imported here because it is slow to import

    return inductor._micro_pipeline_tp


def _gathered(x: Tensor, num_ranks: int, group: str) -> Tensor:
    """All ranks' tensors, concatenated along the first dimension."""
    came = _c10d.wait_tensor(_c10d.all_gather_into_tensor(as_sent(x), num_ranks, group))
    return as_received(came, x.is_complex())


def _scattered(x: Tensor, num_ranks: int, group: str) -> Tensor:
    """This rank's part of the sum, which is cut into equal parts along the first dimension."""
    came = _c10d.wait_tensor(_c10d.reduce_scatter_tensor(as_sent(x), "sum", num_ranks, group))
    return as_received(came, x.is_complex())


def all_gather_packed(xs: list[Tensor], shards: list[Shard], group: str) -> list[Tensor]:
    """:func:`all_gather` of several tensors of one dtype, in one message."""
    num_ranks = shards[0].partition.num_ranks
    fronts = [_part_in_front(x, shard) for x, shard in zip(xs, shards, strict=True)]
    flat = torch.cat([front.reshape(-1) for front in fronts])
    came = _gathered(flat, num_ranks, group).view(num_ranks, -1)
    parts = came.split([front.numel() for front in fronts], 1)
    shapes = [(num_ranks * front.shape[0], *front.shape[1:]) for front in fronts]
    return [_in_full(part.reshape(shape), shard) for part, shape, shard in zip(parts, shapes, shards, strict=True)]


def reduce_scatter_packed(xs: list[Tensor], shards: list[Shard], group: str) -> list[Tensor]:
    """:func:`reduce_scatter` of several tensors of one dtype, in one message."""
    num_ranks = shards[0].partition.num_ranks
    parts = [by_rank(_in_front(x, shard), 0, shard.partition) for x, shard in zip(xs, shards, strict=True)]
    flat = torch.cat([part.reshape(num_ranks, -1) for part in parts], 1).reshape(-1)
    came = _scattered(flat, num_ranks, group)
    shapes = [(part.shape[0] // num_ranks, *part.shape[1:]) for part in parts]
    mine = came.split([part.numel() // num_ranks for part in parts])
    return [_own(own.view(shape), shard, group) for own, shape, shard in zip(mine, shapes, shards, strict=True)]


def _in_front(x: Tensor, shard: Shard) -> Tensor:
    """The sharded axis as the first dimension."""
    x, dim = expose(x, shard)
    return x.movedim(dim, 0)


def _part_in_front(x: Tensor, shard: Shard) -> Tensor:
    """A rank's part, its axis in front, padded to the largest part."""
    front, partition = _in_front(x, shard), shard.partition
    return front if partition.is_even else pad_to(front, max(partition.local_sizes))


def _in_place(front: Tensor, shard: Shard) -> Tensor:
    """Inverse of :func:`_in_front`."""
    dim = shard.dim if shard.outer == 1 else shard.dim + 1
    return conceal(front.movedim(0, dim).contiguous(), shard)


def _in_full(parts: Tensor, shard: Shard) -> Tensor:
    """The full tensor from all ranks' parts, which are concatenated along the first dimension."""
    return _in_place(in_order(parts, 0, shard.partition), shard)


def _own(front: Tensor, shard: Shard, group: str) -> Tensor:
    """This rank's part, without its padding."""
    partition = shard.partition
    return _in_place(front if partition.is_even else front.narrow(0, 0, partition.local_size(rank_in(group))), shard)
