"""One all-to-all for tensors that move from one dimension to another."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from sptransform.ops.communication.collectives import all_to_all
from sptransform.ops.communication.slicing import assemble, by_rank, conceal, expose, in_order, select
from sptransform.ops.groups import rank_in
from sptransform.sharding.intervals import Intervals
from sptransform.sharding.partition import Partition
from sptransform.sharding.placement import Shard


def exchange(xs: list[Tensor], sources: list[Shard], targets: list[Shard], group: str) -> list[Tensor]:
    """Move each ``xs[i]`` from ``sources[i]`` to ``targets[i]`` (another dimension), all in one all-to-all.

    Several ranks may own the same index. In a target, each of its owners gets the entry. In a source, the entries of
    its owners are summed, which is the transpose.
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
    pieces = [[move.piece_for(j) for move in moves] for j in range(num_ranks)]
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
        self._pieces: dict[Intervals, Tensor] = {}
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
            x = by_rank(x, dim, self.target.partition).unflatten(dim, (num, -1))
        else:
            x = x.unsqueeze(dim + 1).expand(*x.shape[: dim + 1], copies, *x.shape[dim + 1 :])
            x = x.flatten(dim, dim + 1).unsqueeze(dim + 1)
        self.block_shape = x.movedim(dim, 0).shape[1:]
        return x.movedim(dim, 0).reshape(num, -1)

    def from_blocks(self, blocks: Tensor) -> Tensor:
        """Assemble the received blocks; row i is from rank i."""
        dim, _ = self.dims
        num = self.source.partition.num_ranks
        x = blocks.reshape(num, *self.block_shape)
        copies = _copies(self.source.partition)
        if copies == 1:
            x = in_order(x.movedim(0, dim).flatten(dim, dim + 1), dim, self.source.partition)
        else:
            x = x.unflatten(0, (-1, copies)).sum(1).movedim(0, dim).flatten(dim, dim + 1)
        return self._finish(x)

    def piece_for(self, rank: int) -> Tensor:
        """What ``rank`` gets, flat. Ranks that own the same get the same tensor: it is cut out once."""
        owned = self.target.partition.owned[rank]
        if owned not in self._pieces:
            self._pieces[owned] = select(self.x, self.dims[1], owned).reshape(-1)
        return self._pieces[owned]

    def shape_from(self, rank: int) -> list[int]:
        shape = list(self.x.shape)
        shape[self.dims[0]] = self.source.partition.local_size(rank)
        even = self.target.partition.is_even  # then the graph must not depend on the rank
        shape[self.dims[1]] = self.target.partition.local_size(0 if even else rank_in(self.group))
        return shape

    def from_pieces(self, pieces: list[Tensor]) -> Tensor:
        return self._finish(assemble(pieces, self.dims[0], self.source.partition))

    def _finish(self, x: Tensor) -> Tensor:
        first, second = (self.source, self.target) if self.source.dim > self.target.dim else (self.target, self.source)
        return conceal(conceal(x, second), first)


def _copies(partition: Partition) -> int | None:
    """1 for regular forms of equal shares; c where each single index belongs to c consecutive ranks; else None."""
    if partition.is_uniform:
        return 1
    num = partition.num_ranks
    if partition.size and num % partition.size == 0:
        copies = num // partition.size
        if all(own == ((rank // copies, rank // copies + 1),) for rank, own in enumerate(partition.owned)):
            return copies
    return None
