"""Reduce parameter gradients, and gather parameters of which ranks keep parts, in few large messages.

Every parameter read by sharded work is moved I -> R once, which costs nothing forward and an all-reduce backward.
Packed into buckets, whose gradients travel together::

    %p0, %p1, ... = redistribute([%w0, %w1, ...], I -> R)

A parameter kept in parts is moved S -> R, an all-gather forward and a reduce-scatter of its gradient backward.

1. Buckets hold parameters of one dtype and one kind of move, at most ``bucket_bytes`` in all, in the order in which the
   forward first reads them.
2. A bucket stands right before its first reader: autograd runs last to first, so a bucket is reduced while the layers
   before it still compute. It stays in front of autocast and grad-mode regions, where gradients might not pass.
3. What is gathered stands one bucket earlier, so that it may travel while the one before is read; no more than
   two are whole at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from sptransform import annotations
from sptransform.pass_manager import Context, Pass
from sptransform.placement import I, R
from sptransform.rewriter import insert_redistribute, is_gather, is_redistribute, succeed


@dataclass(frozen=True)
class BucketGradients(Pass):
    """``bucket_bytes``: largest bucket; a parameter larger than it has one of its own."""

    requires = frozenset({"typed"})
    ensures = frozenset({"functional", "placed", "typed"})

    bucket_bytes: int = 64 * 2**20

    def run(self, graph: fx.Graph, context: Context) -> None:
        order = {node: position for position, node in enumerate(graph.nodes)}
        moves = [node for node in graph.nodes if is_redistribute(node) and _is_of_input(node)]
        first_reader = {
            move: min((reader for output in move.users for reader in output.users), key=order.__getitem__)
            for move in moves
        }
        moves.sort(key=lambda move: order[first_reader[move]])
        buckets: list[list[fx.Node]] = []
        room: dict[object, tuple[list[fx.Node], int]] = {}
        for node in moves:
            (value,) = annotations.values(node)
            size = value.numel() * value.element_size()
            if size > self.bucket_bytes:
                buckets.append([node])
                continue
            key = value.dtype, is_gather(node)
            bucket, left = room.get(key, (None, 0))
            if bucket is None or size > left:
                bucket, left = [], self.bucket_bytes
                buckets.append(bucket)
            bucket.append(node)
            room[key] = (bucket, left - size)
        region = next((node for node in graph.nodes if _opens_region(node)), None)
        outside = _outside_regions(graph)
        gathered: fx.Node | None = None
        for bucket in buckets:
            place = first_reader[bucket[0]]
            if is_gather(bucket[0]):
                earlier, gathered = gathered or place, place
                _merge(bucket, outside[earlier])
            else:
                places = [place] if region is None else [place, region]
                _merge(bucket, min(places, key=order.__getitem__))


def _opens_region(node: fx.Node) -> bool:
    """Autocast and grad-mode nodes compute nothing."""
    return node.op == "call_function" and annotations.value(node) is None and not annotations.handles_tensors(node)


def _outside_regions(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Every node, or the node that opens the outermost region it is in."""
    found, depth, opening = {}, 0, None
    for node in graph.nodes:
        if _opens_region(node):
            closes = bool(node.all_input_nodes) or node.args == (True,)
            opening = opening if depth else node
            depth = max(depth - 1, 0) if closes else depth + 1
        found[node] = opening if depth and opening is not None else node
    return found


def _is_of_input(node: fx.Node) -> bool:
    moved = annotations.note(node).transitions
    if len(moved) != 1 or node.args[0][0].op != "placeholder":
        return False
    return moved[0] == (I, R) or (is_gather(node) and annotations.note(node.args[0][0]).is_parameter)


def _merge(nodes: list[fx.Node], before: fx.Node) -> None:
    transitions = [transition for node in nodes for transition in annotations.note(node).transitions]
    new = insert_redistribute(before, [node.args[0][0] for node in nodes], transitions)
    for node, after in zip(nodes, new, strict=True):
        (old,) = node.users
        succeed(old, after)
        node.graph.erase_node(node)
