"""Gather sharded parameters in few large messages, ahead of use.

A sharded parameter is moved S -> R before it is read: an all-gather in the forward, a reduce-scatter of its gradient in
the backward. After, they are packed into buckets, which travel together::

    %p0, %p1, ... = redistribute([%w0, %w1, ...], S -> R)

1. Buckets hold parameters of one dtype, at most ``bucket_bytes`` in all, in the order in which the forward first reads
   them.
2. A bucket stands where the one before it is first read, so that its gather overlaps with compute. At most two buckets
   are gathered at a time. It stands outside of autocast and grad-mode regions: inside, gradients might not pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import notes
from sptransform.graph.buckets import BUCKET_BYTES, fill, first_reader_of
from sptransform.graph.redistribute import is_gather, is_redistribute, merge_redistributes


@dataclass(frozen=True)
class BucketParameters(Pass):
    """``bucket_bytes``: largest bucket; a parameter larger than it has one of its own.

    ``apart``: modules whose parameters share no bucket with others.
    """

    requires = frozenset({"typed"})
    ensures = frozenset({"functional", "placed", "typed"})

    bucket_bytes: int = BUCKET_BYTES
    apart: tuple[str, ...] = ()

    def run(self, graph: fx.Graph, context: Context) -> None:
        order = {node: position for position, node in enumerate(graph.nodes)}
        around = notes.region_around(graph)
        moves = [node for node in graph.nodes if _is_of_parameter(node) and notes.region_of(node) == around]
        first_reader = {move: first_reader_of([move], order) for move in moves}
        moves.sort(key=lambda move: order[first_reader[move]])
        outside = notes.outermost(graph)
        read_before: fx.Node | None = None
        for bucket in fill(moves, self.bucket_bytes, self.apart):
            read = first_reader[bucket[0]]
            merge_redistributes(bucket, outside[read_before or read])
            read_before = read


def _is_of_parameter(node: fx.Node) -> bool:
    if not is_redistribute(node) or len(node.args[0]) != 1:
        return False
    return is_gather(node) and notes.note(node.args[0][0]).is_parameter
