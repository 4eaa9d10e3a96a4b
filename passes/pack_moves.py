"""Send what one op needs in one all-to-all.

Before, queries, keys and values each move on their own; after, one redistribute moves all three.

1. Packed are S(i) -> S(j) redistributes of the same dtype that stand right before the same node.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from sptransform import annotations
from sptransform.pass_manager import Context, Pass
from sptransform.placement import Shard
from sptransform.rewriter import insert_redistribute, is_redistribute, succeed


@dataclass(frozen=True)
class PackAllToAlls(Pass):
    requires = frozenset({"typed"})
    ensures = frozenset({"functional", "placed", "typed"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        waiting: dict[torch.dtype, list[fx.Node]] = {}
        for node in list(graph.nodes):
            if is_redistribute(node):
                if _is_exchange(node):
                    waiting.setdefault(annotations.values(node)[0].dtype, []).append(node)
            elif annotations.projection(node) is None or not is_redistribute(annotations.projection(node)[0]):
                for group in waiting.values():
                    _pack(group)
                waiting = {}


def _is_exchange(node: fx.Node) -> bool:
    return all(isinstance(end, Shard) for transition in annotations.note(node).transitions for end in transition)


def _pack(nodes: list[fx.Node]) -> None:
    """Replace redistributes that stand next to each other by one, put where the last of them is."""
    if len(nodes) < 2:
        return
    sources = [producer for node in nodes for producer in annotations.operands(node)]
    transitions = [t for node in nodes for t in annotations.note(node).transitions]
    old = [user for node in nodes for user in sorted(node.users, key=lambda user: user.args[1])]
    new = insert_redistribute(nodes[0], sources, transitions)
    for before, after in zip(old, new, strict=True):
        succeed(before, after)
    for node in nodes:
        node.graph.erase_node(node)
