"""Collectives of a rewritten graph, forward and backward, and the bytes they send: counted from placements."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor, fx

from sptransform import annotations
from sptransform.mesh import Mesh
from sptransform.placement import TRANSITIONS, Placement, Shard, kind


@dataclass(frozen=True)
class Collective:
    """One message of a training step.

    Attributes:
        kind: "all_to_all", "all_gather", "reduce_scatter" or "all_reduce".
        direction: "forward" or "backward".
        bytes_sent: what this rank sends to others; an all-reduce counts as reduce-scatter and all-gather.
        layer: path of the module it stands in.
        node: name of the graph's node.
        count: number of messages.
    """

    kind: str
    direction: str
    bytes_sent: int
    layer: str
    node: str
    count: int = 1


def count_collectives(graph: fx.Graph, mesh: Mesh) -> list[Collective]:
    """Every collective of the graph (lowered or not) in order: forward, then backward."""
    forward, backward = [], []
    for node in graph.nodes:
        note = annotations.note(node)
        if not note.transitions:
            continue
        ahead, behind = TRANSITIONS[kind(note.transitions[0][0]), kind(note.transitions[0][1])]
        layer = annotations.module_path(node)
        if ahead is not None:
            forward.append(Collective(ahead, "forward", _sent(node, ahead, mesh, False), layer, node.name))
        if behind is not None and note.differentiable:
            backward.append(Collective(behind, "backward", _sent(node, behind, mesh, True), layer, node.name))
    return [*forward, *reversed(backward)]


def _sent(node: fx.Node, kind_: str, mesh: Mesh, is_backward: bool) -> int:
    total = 0
    for (source, target), (shape, value) in zip(annotations.note(node).transitions, _tensors(node), strict=True):
        if is_backward:
            if not annotations.note(node).differentiable:
                continue
            source, target = target, source
        total += _bytes_sent(kind_, source, target, shape, value.element_size(), mesh)
    return total


def _tensors(node: fx.Node) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """(global shape, value) of every tensor a redistribution moves."""
    for (source, _), (producer, _) in zip(annotations.note(node).transitions, annotations.operands(node), strict=True):
        value = annotations.value(producer)
        shape = list(value.shape)
        if isinstance(source, Shard):
            shape[source.dim] = source.dim_size
        yield tuple(shape), value


def _bytes_sent(
    kind_: str, source: Placement, target: Placement, shape: tuple[int, ...], element_size: int, mesh: Mesh
) -> int:
    """Bytes one rank sends to the others for one tensor, exactly, uneven partitions included."""
    num_bytes = element_size * prod(shape)
    others = [rank for rank in range(mesh.size) if rank != mesh.rank]
    if kind_ == "all_reduce":
        return 2 * num_bytes * (mesh.size - 1) // mesh.size
    if kind_ == "all_to_all":
        assert isinstance(source, Shard) and isinstance(target, Shard)
        rest = num_bytes // (source.partition.size * target.partition.size)
        mine = source.partition.local_size(mesh.rank)
        return sum(mine * target.partition.local_size(rank) * rest for rank in others)
    # all-gather and reduce-scatter send parts padded to the largest
    shard = source if isinstance(source, Shard) else target
    assert isinstance(shard, Shard)
    return len(others) * max(shard.partition.local_sizes) * (num_bytes // shard.partition.size)
