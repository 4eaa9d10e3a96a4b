"""Reduce parameter gradients in few large messages.

Every parameter that sharded ops read is moved I -> R once: no message in the forward, an all-reduce in the backward.
Before, each on its own; after, in buckets whose gradients travel together::

    %p0, %p1, ... = sptransform.replicate([%w0, %w1, ...], ..)

1. Buckets hold parameters of one dtype whose gradients are summed over the same ranks, at most ``bucket_bytes`` in all,
   in the order in which the forward first reads them.
2. A bucket stands right before its first reader: autograd runs last to first, so a bucket is reduced while the layers
   before it still compute. It stays in front of autocast and grad-mode regions: inside, gradients might not pass.
3. With two mesh dims, a bucket of the first may read outputs of a bucket of the second.
4. I -> R moves of computed tensors stay where they are.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import fx

from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow, notes
from sptransform.graph.buckets import BUCKET_BYTES, fill, first_reader_of
from sptransform.graph.edit import rename, succeed_outputs
from sptransform.graph.redistribute import keep_result

_REPLICATE = torch.ops.sptransform.replicate.default


@dataclass(frozen=True)
class BucketGradients(Pass):
    """``bucket_bytes``: largest bucket; a parameter larger than it has one of its own.

    ``apart``: modules whose parameters share no bucket with others.
    """

    requires = frozenset({"local", "lowered"})
    ensures = frozenset({"functional", "local", "lowered"})

    bucket_bytes: int = BUCKET_BYTES
    apart: tuple[str, ...] = ()

    def run(self, graph: fx.Graph, context: Context) -> None:
        for mesh in dict.fromkeys((*(part.mesh for part in context.result.mesh_dims), context.mesh)):
            moved = _moved_inputs(graph)
            moves = [
                node
                for node in graph.find_nodes(op="call_function", target=_REPLICATE)
                if node in moved and notes.note(node).mesh == mesh and len(node.args[0]) == 1
                # others stand in a region that lets gradients pass, under a user's no_grad
                and notes.region_of(node) == notes.region_around(graph)
            ]
            order = {node: position for position, node in enumerate(graph.nodes)}
            outermost = notes.outermost(graph)
            # moves already stand in the order in which they are first read
            for bucket in fill(moves, self.bucket_bytes, self.apart):
                _merge(bucket, outermost[first_reader_of(bucket, order)])


def _moved_inputs(graph: fx.Graph) -> set[fx.Node]:
    """Inputs of the graph, and moves of inputs. All of them stand in front of computed nodes."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        only_moves = bool(notes.note(node).transitions) or dataflow.projection(node) is not None
        if node.op == "placeholder" or (only_moves and found.issuperset(node.all_input_nodes)):
            found.add(node)
    return found


def _merge(nodes: list[fx.Node], before: fx.Node) -> None:
    graph, merged = before.graph, [notes.note(node) for node in nodes]
    with graph.inserting_before(before):
        new = graph.call_function(_REPLICATE, ([node.args[0][0] for node in nodes], nodes[0].args[1]))
        outputs = [graph.call_function(operator.getitem, (new, i)) for i in range(len(nodes))]
    rename(new, "replicate")
    notes.copy(before if before.op == "call_function" else nodes[0], new)
    keep_result(new)
    new.meta["val"] = [value for node in nodes for value in dataflow.values(node)]
    note = notes.note(new)
    note.mesh, note.differentiable = merged[0].mesh, any(each.differentiable for each in merged)
    note.transitions = tuple(transition for each in merged for transition in each.transitions)
    note.placements = tuple(placement for each in merged for placement in each.placements)
    by_dim = zip(*(each.earlier for each in merged), strict=True)
    note.earlier = tuple(None if None in own else tuple(chain(*own)) for own in by_dim)
    for node, output in zip(nodes, outputs, strict=True):
        (old,) = node.users
        notes.fork(old, output)
        succeed_outputs(node, [output])
