"""Sum parameter gradients over two mesh dims at once.

Before, the buckets of one mesh dim are read by those of the other, and their gradients summed twice::

    %p0, %p1 = sptransform.replicate([%w0, %w1], group of the second dim)
    %q0, %q1 = sptransform.replicate([%p0, %p1], group of the first)

after, once over all ranks, which sends less: ``%q0, %q1 = sptransform.replicate([%w0, %w1], group of all)``.

1. Not after uneven shares of the first dim: each of its ranks may then have other buckets over the second.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from sptransform import annotations
from sptransform.pass_manager import Context, Pass


@dataclass(frozen=True)
class MergeReplicates(Pass):
    requires = frozenset({"local", "lowered"})
    ensures = frozenset({"functional", "local", "lowered"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        if len(context.parts) < 2 or not context.parts[0].is_even:
            return
        for node in graph.find_nodes(op="call_function", target=torch.ops.sptransform.replicate.default):
            inner = _inner(node)
            if inner is not None:
                picked = node.args[0]
                node.args = (inner.args[0], context.mesh.group)
                annotations.note(node).mesh = context.mesh
                for x in (*picked, inner):
                    graph.erase_node(x)


def _inner(node: fx.Node) -> fx.Node | None:
    """The bucket whose members, all of them and in order, this one has and nobody else reads."""
    picked = [annotations.projection(x) for x in node.args[0]]
    if None in picked or any(len(x.users) > 1 for x in node.args[0]):
        return None
    (inner, _), *_ = picked
    same = inner.target is node.target and picked == [(inner, i) for i in range(len(inner.args[0]))]
    return inner if same else None
