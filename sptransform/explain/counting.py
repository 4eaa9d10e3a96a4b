"""Collectives of a rewritten graph, forward and backward, and the bytes they send: counted from placements."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
        total += value.element_size() * _elements_sent(kind_, source, target, shape, mesh)
    return total


def _tensors(node: fx.Node) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """(global shape, value) of every tensor a redistribution moves."""
    for (source, _), (producer, _) in zip(annotations.note(node).transitions, annotations.operands(node), strict=True):
        value = annotations.value(producer)
        shape = list(value.shape)
        if isinstance(source, Shard):
            shape[source.dim] = source.dim_size
        yield tuple(shape), value


def _elements_sent(
    kind_: str, source: Placement, target: Placement, shape: tuple[int, ...], mesh: Mesh
) -> int:
    """Elements one rank sends to the others, exactly, uneven partitions included."""
    numel = 1
    for size in shape:
        numel *= size
    me, others = mesh.rank, [rank for rank in range(mesh.size) if rank != mesh.rank]
    if kind_ == "all_reduce":
        return 2 * numel * (mesh.size - 1) // mesh.size
    if kind_ == "all_gather":
        shard = source if isinstance(source, Shard) else target
        assert isinstance(shard, Shard)
        return len(others) * max(shard.partition.local_sizes) * (numel // shard.partition.size)
    if kind_ == "reduce_scatter":
        shard = target if isinstance(target, Shard) else source
        assert isinstance(shard, Shard)
        return len(others) * max(shard.partition.local_sizes) * (numel // shard.partition.size)
    assert isinstance(source, Shard) and isinstance(target, Shard)
    rest = numel // (source.partition.size * target.partition.size)
    return sum(source.partition.local_size(me) * target.partition.local_size(rank) * rest for rank in others)
