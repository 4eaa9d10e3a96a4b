"""Groups nodes into buckets; the tensors of a bucket travel in one message."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import fx

from sptransform.graph import dataflow

BUCKET_BYTES = 64 * 2**20


def fill(nodes: Iterable[fx.Node], limit: int) -> list[list[fx.Node]]:
    """Buckets of one dtype and at most ``limit`` bytes, in node order; a larger node gets its own bucket."""
    buckets: list[list[fx.Node]] = []
    room: dict[torch.dtype, tuple[list[fx.Node], int]] = {}
    for node in nodes:
        (value,) = dataflow.values(node)
        size = value.numel() * value.element_size()
        if size > limit:
            buckets.append([node])
            continue
        bucket, left = room.get(value.dtype, (None, 0))
        if bucket is None or size > left:
            bucket, left = [], limit
            buckets.append(bucket)
        bucket.append(node)
        room[value.dtype] = (bucket, left - size)
    return buckets


def first_reader_of(moves: Iterable[fx.Node], order: Mapping[fx.Node, int]) -> fx.Node:
    """The first node, in ``order``, that reads an output of one of ``moves``."""
    return min((reader for move in moves for output in move.users for reader in output.users), key=order.__getitem__)
