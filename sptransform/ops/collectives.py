"""Functional collectives, and the sharded exchanges made of them. The only place that emits ``_c10d_functional``.

Everything here works on plain tensors, knows nothing of gradients, and is traced through by AOTAutograd, so that
Inductor sees the collectives it knows. Where ranks own equally much nothing depends on the rank.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from sptransform.ops.groups import rank_in
from sptransform.ops.pieces import assemble, conceal, expose, select
from sptransform.partition import Partition
from sptransform.placement import Shard

_c10d = torch.ops._c10d_functional


def all_reduce(x: Tensor, group: str, op: str = "sum") -> Tensor:
    """Sum, or another reduction, over the ranks."""
    if x.dtype == torch.bool:
        raise TypeError("a boolean cannot be summed over ranks")
    return _c10d.wait_tensor(_c10d.all_reduce(x.contiguous(), op, group))


def all_to_all(x: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
    """1-D exchange: ``sent[j]`` entries to rank j, ``received[i]`` from rank i."""
    return _c10d.wait_tensor(_c10d.all_to_all_single(x.contiguous(), received, sent, group))


def all_gather(x: Tensor, shard: Shard, group: str) -> Tensor:
    """Every rank's part -> the whole. Uneven parts travel padded to the largest."""
    num_ranks = shard.partition.num_ranks
    if not shard.partition.is_blocks:
        return _whole(_gathered(_part_in_front(x, shard), num_ranks, group), shard)
    x, dim = expose(x, shard)
    if not _is_first(x, dim):
        return conceal(torch.cat(_gathered(x, num_ranks, group).chunk(num_ranks), dim), shard)
    whole = _gathered(x.flatten(0, dim), num_ranks, group)
    return conceal(whole.view(*x.shape[:dim], *whole.shape) if dim else whole, shard)


def reduce_scatter(x: Tensor, shard: Shard, group: str) -> Tensor:
    """Pending sum of wholes -> every rank's part of the sum."""
    num_ranks = shard.partition.num_ranks
    if not shard.partition.is_blocks:
        parts = _by_rank(_in_front(x, shard), 0, shard.partition)
        return _own(_scattered(parts, num_ranks, group), shard, group)
    x, dim = expose(x, shard)
    if not _is_first(x, dim):
        return conceal(_scattered(torch.cat(x.chunk(num_ranks, dim)), num_ranks, group), shard)
    mine = _scattered(x.flatten(0, dim), num_ranks, group)
    return conceal(mine.view(*x.shape[:dim], *mine.shape) if dim else mine, shard)


def _is_first(x: Tensor, dim: int) -> bool:
    """Whether parts along ``dim`` are to be seen as lying one after the other in memory, so that none is copied.

    Of the other form, chunks and their concatenation, Inductor makes one op with the matmuls next to it, if told to
    (its ``micro_pipeline_tp.py``): then that form copies nothing, and a sequence viewed as rows would hide matmuls.
    """
    return dim == 0 or (prod(x.shape[:dim]) == 1 and not _micro_pipelines())


def _micro_pipelines() -> bool:
    import torch._inductor.config as inductor  # slow to import, and of use to those only who have set it

    return inductor._micro_pipeline_tp


def _gathered(x: Tensor, num_ranks: int, group: str) -> Tensor:
    """All ranks' tensors, one after the other along the first dimension."""
    return _c10d.wait_tensor(_c10d.all_gather_into_tensor(x.contiguous(), num_ranks, group))


def _scattered(x: Tensor, num_ranks: int, group: str) -> Tensor:
    """This rank's of the equal parts of a sum, along the first dimension."""
    return _c10d.wait_tensor(_c10d.reduce_scatter_tensor(x.contiguous(), "sum", num_ranks, group))


def all_gather_packed(xs: list[Tensor], shards: list[Shard], group: str) -> list[Tensor]:
    """:func:`all_gather` of several tensors of one dtype, in one message."""
    num_ranks = shards[0].partition.num_ranks
    fronts = [_part_in_front(x, shard) for x, shard in zip(xs, shards, strict=True)]
    flat = torch.cat([front.reshape(-1) for front in fronts])
    came = _gathered(flat, num_ranks, group).view(num_ranks, -1)
    parts = came.split([front.numel() for front in fronts], 1)
    shapes = [(num_ranks * front.shape[0], *front.shape[1:]) for front in fronts]
    return [_whole(part.reshape(shape), shard) for part, shape, shard in zip(parts, shapes, shards, strict=True)]


def reduce_scatter_packed(xs: list[Tensor], shards: list[Shard], group: str) -> list[Tensor]:
    """:func:`reduce_scatter` of several tensors of one dtype, in one message."""
    num_ranks = shards[0].partition.num_ranks
    parts = [_by_rank(_in_front(x, shard), 0, shard.partition) for x, shard in zip(xs, shards, strict=True)]
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
    return front if partition.is_even else _pad_to(front, max(partition.local_sizes))


def _in_place(front: Tensor, shard: Shard) -> Tensor:
    """Inverse of :func:`_in_front`."""
    dim = shard.dim if shard.outer == 1 else shard.dim + 1
    return conceal(front.movedim(0, dim).contiguous(), shard)


def _whole(parts: Tensor, shard: Shard) -> Tensor:
    """The whole tensor from all ranks' parts, one after the other along the first dimension."""
    return _in_place(_in_order(parts, 0, shard.partition), shard)


def _own(front: Tensor, shard: Shard, group: str) -> Tensor:
    """This rank's part, without its padding."""
    partition = shard.partition
    return _in_place(front if partition.is_even else front.narrow(0, 0, partition.local_size(rank_in(group))), shard)


def _by_rank(x: Tensor, dim: int, partition: Partition) -> Tensor:
    """The axis ``dim`` rearranged: every rank's part, one after the other, each padded to the largest."""
    if partition.is_blocks:
        return x
    if partition.is_zigzag:
        first, last = x.unflatten(dim, (2, partition.num_ranks, -1)).unbind(dim)
        return torch.stack([first, last.flip(dim)], dim + 1).flatten(dim, dim + 2)
    largest = max(partition.local_sizes)
    return torch.cat([_pad_to(select(x, dim, own), largest, dim) for own in partition.owned], dim)


def _in_order(parts: Tensor, dim: int, partition: Partition) -> Tensor:
    """Inverse of :func:`_by_rank`; what several ranks own is summed over them."""
    if partition.is_blocks:
        return parts
    if partition.is_zigzag:
        first, last = parts.unflatten(dim, (partition.num_ranks, 2, -1)).unbind(dim + 1)
        return torch.cat([first, last.flip(dim)], dim).flatten(dim, dim + 1)
    largest = max(partition.local_sizes)
    own = [parts.narrow(dim, rank * largest, size) for rank, size in enumerate(partition.local_sizes)]
    return assemble(own, dim, partition)


def _pad_to(x: Tensor, size: int, dim: int = 0) -> Tensor:
    missing = size - x.shape[dim]
    if not missing:
        return x
    return torch.cat([x, x.new_zeros(*x.shape[:dim], missing, *x.shape[dim + 1 :])], dim)


def exchange(xs: list[Tensor], sources: list[Shard], targets: list[Shard], group: str) -> list[Tensor]:
    """Move each ``xs[i]`` from ``sources[i]`` to ``targets[i]`` (another dimension), all in one all-to-all.

    Where several ranks own the same index in a source, their entries are summed: the transpose of a target whose
    ranks need the same index. A target may overlap so; then everybody who needs an index gets it.
    """
    assert len({x.dtype for x in xs}) == 1, "one message has one dtype"
    moves = [_Move(x, source, target, group) for x, source, target in zip(xs, sources, targets, strict=True)]
    num_ranks = sources[0].partition.num_ranks
    if all(move.is_uniform for move in moves):
        blocks = [move.uniform_blocks() for move in moves]
        packed = torch.cat(blocks, 1) if len(blocks) > 1 else blocks[0]
        counts = [packed.shape[1]] * num_ranks
        came = all_to_all(packed.reshape(-1), counts, counts, group).view(num_ranks, -1)
        widths = [block.shape[1] for block in blocks]
        return [move.from_blocks(block) for move, block in zip(moves, came.split(widths, 1), strict=True)]
    pieces = [[move.piece_for(j).reshape(-1) for move in moves] for j in range(num_ranks)]
    sent = [sum(piece.numel() for piece in group_) for group_ in pieces]
    shapes = [[move.shape_from(i) for move in moves] for i in range(num_ranks)]
    received = [sum(prod(shape) for shape in group_) for group_ in shapes]
    came = all_to_all(torch.cat([piece for group_ in pieces for piece in group_]), sent, received, group)
    flat = iter(came.split([prod(shape) for group_ in shapes for shape in group_]))
    arrived = [[next(flat).view(shape) for shape in group_] for group_ in shapes]
    return [move.from_pieces([row[i] for row in arrived]) for i, move in enumerate(moves)]


class _Move:
    """One tensor of an exchange: cut along the target's axis, reassembled along the source's."""

    def __init__(self, x: Tensor, source: Shard, target: Shard, group: str) -> None:
        if source.dim == target.dim:
            raise ValueError(f"an exchange moves between dimensions, not {source.spec} to {target.spec}")
        # expose the later dimension first, so that the earlier one keeps its number
        self.source, self.target, self.group = source, target, group
        first, second = (source, target) if source.dim > target.dim else (target, source)
        x, first_dim = expose(x, first)
        x, second_dim = expose(x, second)
        if second.outer != 1:
            first_dim += 1
        self.x = x
        self.dims = (first_dim, second_dim) if first is source else (second_dim, first_dim)

    @property
    def is_uniform(self) -> bool:
        """Every rank sends the same-shaped block to every rank, so nothing depends on the rank."""
        return _copies(self.source.partition) is not None and _copies(self.target.partition) is not None

    def uniform_blocks(self) -> Tensor:
        """``[num_ranks, entries]``: row j is what rank j gets."""
        _, dim = self.dims
        x, num = self.x, self.target.partition.num_ranks
        copies = _copies(self.target.partition)
        if copies == 1:
            x = _by_rank(x, dim, self.target.partition).unflatten(dim, (num, -1))
        else:
            x = x.unsqueeze(dim + 1).expand(*x.shape[: dim + 1], copies, *x.shape[dim + 1 :])
            x = x.flatten(dim, dim + 1).unsqueeze(dim + 1)
        self.block_shape = x.movedim(dim, 0).shape[1:]
        return x.movedim(dim, 0).reshape(num, -1)

    def from_blocks(self, blocks: Tensor) -> Tensor:
        """Put together what came, row i from rank i."""
        dim, _ = self.dims
        num = self.source.partition.num_ranks
        x = blocks.reshape(num, *self.block_shape)
        copies = _copies(self.source.partition)
        if copies == 1:
            x = _in_order(x.movedim(0, dim).flatten(dim, dim + 1), dim, self.source.partition)
        else:
            x = x.unflatten(0, (-1, copies)).sum(1).movedim(0, dim).flatten(dim, dim + 1)
        return self._finish(x)

    def piece_for(self, rank: int) -> Tensor:
        return select(self.x, self.dims[1], self.target.partition.owned[rank])

    def shape_from(self, rank: int) -> list[int]:
        shape = list(self.x.shape)
        shape[self.dims[0]] = self.source.partition.local_size(rank)
        even = self.target.partition.is_even  # then who we are makes no difference to the graph
        shape[self.dims[1]] = self.target.partition.local_size(0 if even else rank_in(self.group))
        return shape

    def from_pieces(self, pieces: list[Tensor]) -> Tensor:
        return self._finish(assemble(pieces, self.dims[0], self.source.partition))

    def _finish(self, x: Tensor) -> Tensor:
        first, second = (self.source, self.target) if self.source.dim > self.target.dim else (self.target, self.source)
        return conceal(conceal(x, second), first)


def _copies(partition: Partition) -> int | None:
    """1 for equal blocks or chunks; c where each single index belongs to c consecutive ranks; else None."""
    if partition.is_blocks or partition.is_zigzag:
        return 1
    num = partition.num_ranks
    if partition.size and num % partition.size == 0:
        copies = num // partition.size
        if all(own == ((rank // copies, rank // copies + 1),) for rank, own in enumerate(partition.owned)):
            return copies
    return None
