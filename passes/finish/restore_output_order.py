"""Return outputs in sequence order from a graph distributed over two mesh dims.

Each mesh dim cuts the shards of the one before it: rank (r, u) has the u-th part of the shard of rank r of the first
dim, in the order in which that shard is stored. Before, ``%logits : S(1)`` over both; after, contiguous chunks, as
``[Shard(1), Shard(1)]`` of a DTensor means them::

    %logits_1 = sptransform.repartition(%logits, S(1:64[0:8|24:32|8:16|16:24]), S(1:32/4), ..)

1. One exchange among all ranks, and only for outputs in another order.
2. After uneven shares of the first dim, outputs are replicated over the second, and the exchange is over the first.
3. With one mesh dim, InsertRedistributes has done this, and nothing is left to do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow, notes
from sptransform.graph.edit import emitter
from sptransform.ops.groups import pretend
from sptransform.sharding.mesh import Mesh
from sptransform.sharding.partition import Partition
from sptransform.sharding.placement import Placement, Shard


@dataclass(frozen=True)
class RestoreOutputOrder(Pass):
    requires = frozenset({"local", "lowered"})
    ensures = frozenset({"functional", "local", "lowered"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        if len(context.result.mesh_dims) < 2 or context.returns_whole:
            return
        (output,) = graph.find_nodes(op="output")
        leaves = list(output.args[0]) if isinstance(output.args[0], list | tuple) else [output.args[0]]
        first, second = context.result.mesh_dims
        placements = list(zip(first.result.output_placements, second.result.output_placements, strict=True))
        for index, (leaf, (outer, inner)) in enumerate(zip(leaves, placements, strict=True)):
            if isinstance(outer, Shard):
                leaves[index], placements[index] = _in_order(leaf, outer, inner, output, context)
        output.args = (tuple(leaves),)
        for part, own in zip((first, second), zip(*placements, strict=True), strict=True):
            part.result.output_placements = own


def _in_order(
    x: fx.Node, outer: Shard, inner: Placement, before: fx.Node, context: Context
) -> tuple[fx.Node, tuple[Placement, Placement]]:
    """``x`` in contiguous chunks, and how the two mesh dims now cut it."""
    first, second = (part.mesh for part in context.result.mesh_dims)
    chunks = Partition.contiguous(outer.partition.size, first.size)
    ordered = replace(outer, partition=chunks)
    if isinstance(inner, Shard) and inner.dim == outer.dim:
        source, target = (replace(outer, partition=p.divided(second.size)) for p in (outer.partition, chunks))
        inner = replace(inner, partition=Partition.contiguous(chunks.local_size(first.rank), second.size))
        return _moved(x, source, target, context.mesh, before), (ordered, inner)
    return _moved(x, outer, ordered, first, before), (ordered, inner)


def _moved(x: fx.Node, source: Shard, target: Shard, mesh: Mesh, before: fx.Node) -> fx.Node:
    if source == target:
        return x
    with dataflow.value(x).fake_mode, torch.no_grad(), pretend(mesh.group, mesh.rank):
        args = (x, source.spec, target.spec, mesh.group)
        node = emitter(before)(torch.ops.sptransform.repartition.default, args, {})
    notes.copy(x, node)
    note = notes.note(node)
    note.transitions, note.mesh, note.placements = ((source, target),), mesh, notes.note(x).placements
    return node
