"""Sum parameter gradients over two mesh dims at once.

Before, the gradient of a parameter is summed over one mesh dim, then over the other::

    %p = sptransform.replicate([%w], group of the second dim)
    %q = sptransform.replicate([%p], group of the first)

after, once over all ranks, which sends less: ``%q = sptransform.replicate([%w], group of all)``.

1. Not after uneven shares of the first dim: its ranks may then sum different gradients over the second.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow, notes


@dataclass(frozen=True)
class MergeGradientSums(Pass):
    requires = frozenset({"local", "lowered"})
    ensures = frozenset({"functional", "local", "lowered"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        if len(context.result.mesh_dims) < 2 or not context.result.mesh_dims[0].result.is_even:
            return
        for node in graph.find_nodes(op="call_function", target=torch.ops.sptransform.replicate.default):
            (read,) = node.args[0]
            picked = dataflow.projection(read)
            if picked is not None and picked[0].target is node.target and len(read.users) == 1:
                inner, _ = picked
                node.args = (inner.args[0], context.mesh.group)
                notes.note(node).mesh = context.mesh
                graph.erase_node(read)
                graph.erase_node(inner)
