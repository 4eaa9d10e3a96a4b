"""Cut a tensor along an axis into the parts of a partition, and assemble parts again.

Plain tensor algebra without communication. ``dim`` is always exactly the partitioned axis (see :func:`expose`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sptransform.sharding.intervals import Intervals
from sptransform.sharding.partition import Partition
from sptransform.sharding.placement import Shard


def by_rank(x: Tensor, dim: int, partition: Partition) -> Tensor:
    """The axis ``dim`` rearranged: every rank's part, one after the other, each padded to the largest."""
    if partition.is_blocks:
        return x
    if partition.is_zigzag:
        first, last = x.unflatten(dim, (2, partition.num_ranks, -1)).unbind(dim)
        return torch.stack([first, last.flip(dim)], dim + 1).flatten(dim, dim + 2)
    if partition.num_tiles is not None:
        tiles = x.unflatten(dim, (partition.num_tiles, partition.num_ranks, -1))
        return tiles.transpose(dim, dim + 1).flatten(dim, dim + 2)
    if partition.stripe is not None:
        rounds = partition.rounds
        pieces = zip(x.split([part.size for part in rounds], dim), rounds, strict=True)
        dealt = [by_rank(piece, dim, part).unflatten(dim, (partition.num_ranks, -1)) for piece, part in pieces]
        return torch.cat(dealt, dim + 1).flatten(dim, dim + 1)
    largest = max(partition.local_sizes)
    return torch.cat([pad_to(select(x, dim, own), largest, dim) for own in partition.owned], dim)


def in_order(parts: Tensor, dim: int, partition: Partition) -> Tensor:
    """Inverse of :func:`by_rank`; entries that several ranks own are summed."""
    if partition.is_blocks:
        return parts
    if partition.is_zigzag:
        first, last = parts.unflatten(dim, (partition.num_ranks, 2, -1)).unbind(dim + 1)
        return torch.cat([first, last.flip(dim)], dim).flatten(dim, dim + 1)
    if partition.num_tiles is not None:
        tiles = parts.unflatten(dim, (partition.num_ranks, partition.num_tiles, -1))
        return tiles.transpose(dim, dim + 1).flatten(dim, dim + 2)
    if partition.stripe is not None:
        rounds = partition.rounds
        own = parts.unflatten(dim, (partition.num_ranks, -1))
        pieces = zip(own.split([max(part.local_sizes) for part in rounds], dim + 1), rounds, strict=True)
        return torch.cat([in_order(piece.flatten(dim, dim + 1), dim, part) for piece, part in pieces], dim)
    largest = max(partition.local_sizes)
    own = [parts.narrow(dim, rank * largest, size) for rank, size in enumerate(partition.local_sizes)]
    return assemble(own, dim, partition)


def pad_to(x: Tensor, size: int, dim: int = 0) -> Tensor:
    missing = size - x.shape[dim]
    if not missing:
        return x
    return torch.cat([x, x.new_zeros(*x.shape[:dim], missing, *x.shape[dim + 1 :])], dim)


def expose(x: Tensor, shard: Shard) -> tuple[Tensor, int]:
    """View ``x`` (local or global) so that the sharded axis is a dimension of its own; return it with that dim."""
    if shard.outer == 1:
        return x, shard.dim
    # no -1: it is ambiguous where a rank owns nothing
    inner = x.shape[shard.dim] // shard.outer
    return x.reshape(*x.shape[: shard.dim], shard.outer, inner, *x.shape[shard.dim + 1 :]), shard.dim + 1


def conceal(x: Tensor, shard: Shard) -> Tensor:
    """Inverse of :func:`expose`."""
    return x if shard.outer == 1 else x.flatten(shard.dim, shard.dim + 1)


def select(x: Tensor, dim: int, intervals: Intervals) -> Tensor:
    """The indices in ``intervals`` of ``x`` along ``dim``, in that order."""
    parts = [x.narrow(dim, lo, hi - lo) for lo, hi in intervals]
    if not parts:
        return x.narrow(dim, 0, 0)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def assemble(parts: Sequence[Tensor], dim: int, partition: Partition) -> Tensor:
    """The full axis from every rank's part; entries that several ranks own are summed."""
    runs: list[tuple[int, int, Tensor]] = []
    for part, intervals in zip(parts, partition.owned, strict=True):
        at = 0
        for lo, hi in intervals:
            runs.append((lo, hi, _narrowed(part, dim, at, hi - lo)))
            at += hi - lo
    bounds = sorted({0, partition.size, *(lo for lo, _, _ in runs), *(hi for _, hi, _ in runs)})
    segments = []
    for lo, hi in pairwise(bounds):
        owners = [_narrowed(x, dim, lo - start, hi - lo) for start, stop, x in runs if start <= lo and hi <= stop]
        if owners:
            segments.append(sum(owners[1:], owners[0]))
        else:
            shape = list(parts[0].shape)
            shape[dim] = hi - lo
            segments.append(parts[0].new_zeros(shape))
    if not segments:  # the axis is empty
        return parts[0].narrow(dim, 0, 0)
    return segments[0].narrow(dim, 0, partition.size) if len(segments) == 1 else torch.cat(segments, dim)


def _narrowed(x: Tensor, dim: int, start: int, size: int) -> Tensor:
    """``x.narrow``, unless that is all of ``x``: with many ranks, graphs have many of these."""
    return x if x.shape[dim] == size else x.narrow(dim, start, size)
