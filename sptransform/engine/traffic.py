"""Collectives of a rewritten graph, forward and backward, and the bytes one rank sends: counted from placements.

The count is what `ops/` sends, padding included, without what stays on the rank:

- all-to-all: this rank's part of every tensor, once for each other rank that needs it; along one axis, only the
  indices that other ranks have;
- an op that communicates itself (a ring): what its table entry says;
- all-gather, reduce-scatter: one part for each other rank, padded to the largest part;
- all-reduce: 2(N-1)/N of the buffer, as a reduce-scatter and an all-gather; a library may split it differently.

A redistribute has a backward if a gradient flows through it: it lies between a trainable tensor and an output of the
graph. All outputs are assumed to have gradients, as in AOTAutograd.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from sptransform.diagnostics import provenance
from sptransform.graph import dataflow, notes
from sptransform.graph.calls import op_call
from sptransform.rules.table import Sent
from sptransform.sharding.intervals import intersection
from sptransform.sharding.mesh import Mesh
from sptransform.sharding.placement import Placement, Shard, cut_alike, transition


@dataclass(frozen=True)
class Collective:
    """One message of a training step, or several of the same kind from one node.

    Attributes:
        kind: "all_to_all", "all_gather", "reduce_scatter", "all_reduce"; "send_recv" to and from one neighbour each.
        direction: "forward" or "backward".
        bytes_sent: what this rank sends to others.
        layer: path of the module that the node is in.
        node: name of the graph node.
        count: number of messages.
    """

    kind: str
    direction: str
    bytes_sent: int
    layer: str
    node: str
    count: int = 1


@dataclass(frozen=True)
class Sending:
    """What one node of the graph sends.

    Attributes:
        forward, backward: its own collective in each direction, None where it sends nothing.
        again: the forward's collective, repeated in the backward because the node's result is not saved.
    """

    forward: Collective | None
    backward: Collective | None
    again: Collective | None = None


def count_collectives(graph: fx.Graph, mesh: Mesh) -> list[Collective]:
    """Every collective of the graph (lowered or not) in order: forward, then backward."""
    return in_order(sending_by_node(graph, mesh).values())


def in_order(sendings: Iterable[Sending]) -> list[Collective]:
    """The collectives of one step; ``sendings`` are in the graph's order."""
    sendings = list(sendings)
    forward = [sending.forward for sending in sendings]
    backward = [collective for sending in reversed(sendings) for collective in (sending.again, sending.backward)]
    return [collective for collective in (*forward, *backward) if collective is not None]


def sending_by_node(graph: fx.Graph, mesh: Mesh) -> dict[fx.Node, Sending]:
    """What each node that may communicate sends, in the graph's order. Unlowered nodes send over ``mesh``."""
    reached = _with_gradients(graph)
    found = {}
    for node in graph.nodes:
        note = notes.note(node)
        if note.transitions:
            ahead, behind = kinds(node)
            on = note.mesh or mesh
            found[node] = Sending(
                _collective(node, ahead, "forward", on),
                _collective(node, behind, "backward", on) if node in reached else None,
                _collective(node, ahead, "forward", on, again=True) if node in reached and is_redone(node) else None,
            )
        elif note.mesh is not None:
            forward, backward = _own_messages(node)
            found[node] = Sending(
                _of_op(node, forward, "forward"), _of_op(node, backward, "backward") if node in reached else None
            )
    return found


def kinds(node: fx.Node) -> tuple[str | None, str | None]:
    """The collectives of a redistribution's forward and of its transpose."""
    return transition(*notes.note(node).transitions[0])


def _own_messages(node: fx.Node) -> tuple[Sent, Sent]:
    operands = [dataflow.value(x) for x in dataflow.operands(node)]
    note = notes.note(node)
    return note.sends(op_call(node), operands, note.mesh.rank)


def is_redone(node: fx.Node) -> bool:
    """Whether the backward runs the node again instead of reading what was saved."""
    return node.meta.get("recompute") == CheckpointPolicy.MUST_RECOMPUTE


def number_of_messages(graph: fx.Graph) -> tuple[int, int]:
    """How many messages the graph sends forward, and backward; symbolic sizes stay symbolic."""
    reached = _with_gradients(graph)
    forward = backward = 0
    for node in graph.nodes:
        note = notes.note(node)
        if note.transitions:
            ahead, behind = kinds(node)
            counts = ahead is not None, (behind is not None) + (ahead is not None and is_redone(node))
        elif note.mesh is not None:
            counts = tuple(sent.count for sent in _own_messages(node))
        else:
            continue
        forward += counts[0]
        backward += counts[1] if node in reached else 0
    return forward, backward


def _with_gradients(graph: fx.Graph) -> frozenset[fx.Node]:
    """Nodes through which a gradient flows back from what the graph returns."""
    reached: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if _may_pass_gradients(node) and any(user.op == "output" or user in reached for user in node.users):
            reached.add(node)
    return frozenset(reached)


def _may_pass_gradients(node: fx.Node) -> bool:
    note = notes.note(node)
    if note.differentiable:
        return True
    if dataflow.projection(node) is not None or node.op != "call_function":
        return False
    # The getitem nodes of a multi-output op carry the flag. An op's local form may have steps without a placement.
    return note.placements is None or any(dataflow.projection(user) is not None for user in node.users)


def _of_op(node: fx.Node, sent: Sent, direction: str) -> Collective | None:
    if not sent.count:
        return None
    return Collective(sent.kind, direction, sent.bytes_sent, provenance.module_path(node), node.name, sent.count)


def _collective(
    node: fx.Node, kind_: str | None, direction: str, mesh: Mesh, *, again: bool = False
) -> Collective | None:
    if kind_ is None:
        return None
    moves = []
    for source, target, shape, element_size in _moves(node):
        ends = (source, target) if direction == "forward" else (target, source)
        moves.append((*ends, shape, element_size))
    num_bytes = _bytes_sent(kind_, moves, mesh)
    return Collective(kind_, "backward" if again else direction, num_bytes, provenance.module_path(node), node.name)


Move = tuple[Placement, Placement, tuple[int, ...], int]  # from, to, global shape, bytes per element


def _moves(node: fx.Node) -> Iterable[Move]:
    """Every tensor that a redistribution moves, in forward direction."""
    transitions = notes.note(node).transitions
    for (source, target), producer in zip(transitions, dataflow.operands(node), strict=True):
        value = dataflow.value(producer)
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
    if cut_alike(source, target):
        own = source.partition.owned[rank]
        others = (owned for other, owned in enumerate(target.partition.owned) if other != rank)
        leaving = sum(hi - lo for owned in others for lo, hi in intersection(own, owned))
        return element_size * source.outer * leaving * prod(n for dim, n in enumerate(shape) if dim != source.dim)
    entry = element_size * source.outer * target.outer
    entry *= prod(size for dim, size in enumerate(shape) if dim not in (source.dim, target.dim))
    to_others = sum(size for other, size in enumerate(target.partition.local_sizes) if other != rank)
    return entry * source.partition.local_size(rank) * to_others


def _part(source: Placement, target: Placement, shape: tuple[int, ...], element_size: int) -> int:
    """Bytes of the largest part. Only one end of a gather or scatter is a shard, and it defines the cut."""
    shard = source if isinstance(source, Shard) else target
    assert isinstance(shard, Shard)
    entry = element_size * shard.outer * prod(size for dim, size in enumerate(shape) if dim != shard.dim)
    return entry * max(shard.partition.local_sizes)
