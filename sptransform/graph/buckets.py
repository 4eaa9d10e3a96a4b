"""Groups nodes into buckets; the tensors of a bucket travel in one message."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import fx

from sptransform.diagnostics.provenance import module_path
from sptransform.graph import dataflow

BUCKET_BYTES = 64 * 2**20


def fill(moves: Iterable[fx.Node], limit: int, apart: Collection[str] = ()) -> list[list[fx.Node]]:
    """Buckets of one dtype and at most ``limit`` bytes, in node order; a larger node gets its own bucket.

    What a module of ``apart`` reads is in no bucket with others.
    """
    buckets: list[list[fx.Node]] = []
    room: dict[tuple[torch.dtype, str | None], tuple[list[fx.Node], int]] = {}
    nodes = list(moves)
    order = {node: position for position, node in enumerate(nodes[0].graph.nodes)} if apart and nodes else {}
    for node in nodes:
        (value,) = dataflow.values(node)
        size = value.numel() * value.element_size()
        if size > limit:
            buckets.append([node])
            continue
        kind = value.dtype, _module_of(node, order, apart)
        bucket, left = room.get(kind, (None, 0))
        if bucket is None or size > left:
            bucket, left = [], limit
            buckets.append(bucket)
        bucket.append(node)
        room[kind] = (bucket, left - size)
    return buckets


def _module_of(move: fx.Node, order: Mapping[fx.Node, int], apart: Collection[str]) -> str | None:
    """The one of these modules that reads the move first."""
    path = f"{module_path(first_reader_of([move], order))}." if apart else ""
    return next((module for module in apart if path.startswith(f"{module}.")), None)


def first_reader_of(moves: Iterable[fx.Node], order: Mapping[fx.Node, int]) -> fx.Node:
    """The first node, in ``order``, that reads an output of one of ``moves``."""
    return min((reader for move in moves for output in move.users for reader in output.users), key=order.__getitem__)
