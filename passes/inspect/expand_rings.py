"""Show what a ring does: its hops, waits, blocks and merges as nodes of the graph.

Before: ``%ring_attention = sptransform.ring_attention(%q, %k, %v, [], [], ...)``; after, on rank 0 of 2::

    %pack_block = sptransform.pack_block(%k, %v)
    %all_to_all_single = _c10d_functional.all_to_all_single(%pack_block, [0, 256], [0, 256], ...)
    %attention_block = sptransform.attention_block(%q, %k, %v, ...)
    %wait_tensor = _c10d_functional.wait_tensor(%all_to_all_single)
    ...
    %merge_block = sptransform.merge_block(...)

1. The nodes come from the steps that the op runs, see ``ops/ring/trace_steps.py``; they are those of one rank.
2. For reading only: no backward is derived from the expanded forward. The op has its own backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow, notes
from sptransform.graph.edit import fake_arguments, succeed_outputs
from sptransform.ops.ring import trace_steps


@dataclass(frozen=True)
class ExpandRings(Pass):
    requires = frozenset({"lowered", "local"})
    ensures = frozenset({"functional", "lowered"})
    breaks = frozenset({"local"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        for node in list(graph.nodes):
            if node.target is torch.ops.sptransform.ring_attention.default:
                _expand(node)


def _expand(node: fx.Node) -> None:
    mesh = notes.note(node).mesh
    steps = trace_steps("ring_attention", 0 if mesh is None else mesh.rank, *fake_arguments(node))
    places = dict(zip(steps.graph.find_nodes(op="placeholder"), dataflow.operands(node), strict=True))
    with node.graph.inserting_before(node):
        results = node.graph.graph_copy(steps.graph, places)
    for step, copied in places.items():
        if step.op != "placeholder":
            copied.meta = dict(step.meta)
            notes.copy(node, copied)
            notes.derive_differentiable(copied)
    succeed_outputs(node, results)
