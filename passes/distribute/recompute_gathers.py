"""Gather again in the backward, instead of saving the result: keys and values, inputs of linears, parameters.

Before: ``%k1 : R = sptransform.all_gather(%k, S(2) -> R)``, read by attention, is saved for its backward; after, the
node is tagged to be recomputed in the backward, and each rank saves only its shard of the keys.

1. Keys and values, and inputs of linears, if the strategy asks for it (``regather``); sharded parameters always.
2. A checkpointed region would save the result, as it saves all communication: the strategy overrides checkpointing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow, notes
from sptransform.graph.redistribute import is_gather


@dataclass(frozen=True)
class RecomputeGathers(Pass):
    requires = frozenset({"lowered"})
    ensures = frozenset({"functional", "placed", "typed", "lowered"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        for node in graph.nodes:
            if is_gather(node) and all(notes.note(x).is_parameter for x in dataflow.operands(node)):
                _recompute(node)
            if not context.strategy.regather:
                continue
            rule = notes.note(node).rule
            if rule is not None and context.strategy.gathers_for(rule):
                for operand in dataflow.operands(node):
                    picked = dataflow.projection(operand)
                    producer = operand if picked is None else picked[0]
                    if is_gather(producer) and notes.note(producer).mesh == context.mesh:
                        _recompute(producer)


def _recompute(node: fx.Node) -> None:
    for part in (node, *(user for user in node.users if dataflow.projection(user) is not None)):
        part.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        part.meta.setdefault("ac_graph_id", 0)  # torch's partitioner reads it wherever it finds the tag
