"""Decisions written on nodes, and what decided readers ask of a node."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from sptransform.graph import dataflow, notes
from sptransform.rules.decision import Decision
from sptransform.sharding.placement import Placement


def decide(node: fx.Node, decision: Decision) -> None:
    """Note how the node is run, and the placements of its outputs that follow."""
    note = notes.note(node)
    note.decision = decision
    note.placements = decision.outcomes(note.rule, len(dataflow.values(node)))


def demanded(node: fx.Node) -> Iterator[Placement | None]:
    """Placements that readers of the node's outputs demand, of each use; None where the graph returns it."""
    for user in node.users:
        if user.op == "output":
            yield None
        elif dataflow.projection(user) is not None:
            yield from demanded(user)
        elif (decision := notes.note(user).decision) is not None:
            operands = dataflow.operands(user)
            wanted = decision.demands(notes.note(user).rule, len(operands))
            pairs = zip(operands, wanted, strict=True)
            yield from (want for producer, want in pairs if producer is node and want is not None)
