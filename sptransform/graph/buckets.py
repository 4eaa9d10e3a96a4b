"""Nodes put into buckets, whose tensors then travel in one message."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from sptransform.graph import dataflow

BUCKET_BYTES = 64 * 2**20


def fill(nodes: Iterable[fx.Node], limit: int) -> list[list[fx.Node]]:
    """Buckets of at most ``limit`` bytes, of nodes of one dtype, in order; a larger node has its own."""
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
