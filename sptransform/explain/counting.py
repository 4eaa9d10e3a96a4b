"""Collectives of a rewritten graph, forward and backward, and the bytes one rank sends: counted from placements.

What is counted is what `ops/` sends, padding included, and not what stays on the rank:

- all-to-all: this rank's part of every tensor, once for each other rank that needs it;
- all-gather, reduce-scatter: one part for each other rank, padded to the largest part;
- all-reduce: 2(N-1)/N of the buffer, as a reduce-scatter and an all-gather of it; how a library splits it is its own.

A redistribute has a backward where a gradient flows through it: it stands between something trainable and something
the graph returns. Gradients of all returned tensors are assumed, as AOTAutograd does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from torch import fx

from sptransform import annotations
from sptransform.mesh import Mesh
from sptransform.placement import TRANSITIONS, Placement, Shard, kind


@dataclass(frozen=True)
class Collective:
    """One message of a training step.

    Attributes:
        kind: "all_to_all", "all_gather", "reduce_scatter" or "all_reduce".
        direction: "forward" or "backward".
        bytes_sent: what this rank sends to others.
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
    pairs = list(collectives_by_node(graph, mesh).values())
    forward = [ahead for ahead, _ in pairs if ahead is not None]
    return [*forward, *(behind for _, behind in reversed(pairs) if behind is not None)]


def collectives_by_node(graph: fx.Graph, mesh: Mesh) -> dict[fx.Node, tuple[Collective | None, Collective | None]]:
    """Of every redistribution, in the graph's order: what it sends forward, and backward."""
    return {
        node: (_collective(node, ahead, "forward", mesh), _collective(node, behind, "backward", mesh))
        for node, (ahead, behind) in kinds_by_node(graph).items()
    }


def kinds_by_node(graph: fx.Graph) -> dict[fx.Node, tuple[str | None, str | None]]:
    """Of every redistribution, in the graph's order: the collective of its forward, and of its backward."""
    reached = _with_gradients(graph)
    found = {}
    for node in graph.nodes:
        if annotations.note(node).transitions:
            source, target = annotations.note(node).transitions[0]
            ahead, behind = TRANSITIONS[kind(source), kind(target)]
            found[node] = ahead, behind if node in reached else None
    return found


def _with_gradients(graph: fx.Graph) -> frozenset[fx.Node]:
    """Nodes through which a gradient flows back from what the graph returns."""
    reached: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if _may_pass_gradients(node) and any(user.op == "output" or user in reached for user in node.users):
            reached.add(node)
    return frozenset(reached)


def _may_pass_gradients(node: fx.Node) -> bool:
    note = annotations.note(node)
    if note.differentiable:
        return True
    if annotations.projection(node) is not None or node.op != "call_function":
        return False
    # of an op with several outputs, the nodes that pick one know; an op's local form may have steps without a placement
    return note.placements is None or any(annotations.projection(user) is not None for user in node.users)


def _collective(node: fx.Node, kind_: str | None, direction: str, mesh: Mesh) -> Collective | None:
    if kind_ is None:
        return None
    moves = []
    for source, target, shape, element_size in _moves(node):
        ends = (source, target) if direction == "forward" else (target, source)
        moves.append((*ends, shape, element_size))
    return Collective(kind_, direction, _bytes_sent(kind_, moves, mesh), annotations.module_path(node), node.name)


Move = tuple[Placement, Placement, tuple[int, ...], int]  # from, to, global shape, bytes an element


def _moves(node: fx.Node) -> Iterable[Move]:
    """Every tensor a redistribution moves, as its forward does."""
    transitions = annotations.note(node).transitions
    for (source, target), producer in zip(transitions, annotations.operands(node), strict=True):
        value = annotations.value(producer)
        yield source, target, global_shape(source, tuple(value.shape)), value.element_size()


def global_shape(placement: Placement, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Global shape of a tensor of local or global ``shape``."""
    if not isinstance(placement, Shard):
        return shape
    return (*shape[: placement.dim], placement.dim_size, *shape[placement.dim + 1 :])


def _bytes_sent(kind_: str, moves: Iterable[Move], mesh: Mesh) -> int:
    """Bytes this rank sends in one message that makes all ``moves``."""
    if kind_ == "all_reduce":
        return 2 * sum(element_size * prod(shape) for _, _, shape, element_size in moves) * (mesh.size - 1) // mesh.size
    if kind_ == "all_to_all":
        return sum(_sent_by_exchange(*move, mesh.rank) for move in moves)
    return sum(_part(*move) for move in moves) * (mesh.size - 1)


def _sent_by_exchange(
    source: Placement, target: Placement, shape: tuple[int, ...], element_size: int, rank: int
) -> int:
    assert isinstance(source, Shard) and isinstance(target, Shard)
    entry = element_size * source.outer * target.outer
    entry *= prod(size for dim, size in enumerate(shape) if dim not in (source.dim, target.dim))
    to_others = sum(size for other, size in enumerate(target.partition.local_sizes) if other != rank)
    return entry * source.partition.local_size(rank) * to_others


def _part(source: Placement, target: Placement, shape: tuple[int, ...], element_size: int) -> int:
    """Bytes of the largest rank's part: the one end of a gather or scatter that is a shard says how it is cut."""
    shard = source if isinstance(source, Shard) else target
    assert isinstance(shard, Shard)
    entry = element_size * shard.outer * prod(size for dim, size in enumerate(shape) if dim != shard.dim)
    return entry * max(shard.partition.local_sizes)
