"""Send what one op needs in one message.

Before, queries, keys and values each move on their own; after, one redistribute moves all three.

1. Redistributes are packed if they have the same dtype and kind and stand right before the same node. The kinds are
   S(i) -> S(j) with i != j, and S -> R, except of parameters, which have their own buckets.
2. What has no gradient is not packed with what has: all parts of a message have a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow, notes
from sptransform.graph.redistribute import is_redistribute, merge_redistributes
from sptransform.sharding.placement import cut_alike, kind


@dataclass(frozen=True)
class FuseRedistributes(Pass):
    requires = frozenset({"typed"})
    ensures = frozenset({"functional", "placed", "typed"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        waiting: dict[tuple[torch.dtype, str, bool], list[fx.Node]] = {}
        for node in list(graph.nodes):
            if is_redistribute(node):
                if (packable := _packable(node)) is not None:
                    has_gradient = bool(notes.note(node).differentiable)
                    waiting.setdefault((dataflow.values(node)[0].dtype, packable, has_gradient), []).append(node)
            elif dataflow.projection(node) is None or not is_redistribute(dataflow.projection(node)[0]):
                for group in waiting.values():
                    if len(group) > 1:
                        # not where the first stands: between them may stand what a later one reads
                        merge_redistributes(group, group[-1])
                waiting = {}


def _packable(node: fx.Node) -> str | None:
    """The kind of message that this redistribute can share with others; None if it is sent alone."""
    transitions = notes.note(node).transitions
    kinds = {kind(source) + kind(target) for source, target in transitions}
    if kinds == {"SS"} and not cut_alike(*transitions[0]):
        return "all_to_all"
    is_parameter = notes.note(dataflow.operands(node)[0]).is_parameter
    return "gather" if kinds == {"SR"} and not is_parameter else None
