"""The node that stands for a change of placement until it is lowered to collectives."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import islice
from typing import Any

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from sptransform.graph import dataflow, notes
from sptransform.graph.edit import rename, succeed_outputs
from sptransform.sharding.placement import Placement, R, Shard


def redistribute(xs: list[Any], transitions: tuple[tuple[Placement, Placement], ...]) -> list[Any]:
    """Marks a change of placement of one or more tensors; lowered to collectives, never run."""
    raise AssertionError("a redistribute node was left in the graph")


def is_redistribute(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is redistribute


def is_gather(node: fx.Node) -> bool:
    """Whether every transition of the node, lowered or not, gathers a shard to R."""
    changes = notes.note(node).transitions
    return bool(changes) and all(isinstance(source, Shard) and target == R for source, target in changes)


def insert_redistribute(
    before: fx.Node, sources: Sequence[fx.Node], transitions: Sequence[tuple[Placement, Placement]]
) -> list[fx.Node]:
    """Add one redistribute node in front of ``before``; return one node per moved tensor."""
    graph = before.graph
    with graph.inserting_before(before):
        node = graph.call_function(redistribute, (list(sources), tuple(transitions)))
        outputs = [graph.call_function(operator.getitem, (node, i)) for i in range(len(sources))]
    node.meta["val"] = [dataflow.value(source) for source in sources]
    note = notes.note(node)
    note.transitions = tuple(transitions)
    note.placements = tuple(target for _, target in transitions)
    notes.derive_differentiable(node)
    notes.copy(before if before.op == "call_function" else sources[0], node)
    for output, source, (_, target) in zip(outputs, sources, transitions, strict=True):
        rename(output, f"{source.name}_{target}".rstrip(")"))
        output.meta["val"] = dataflow.value(source)
        notes.note(output).differentiable = notes.note(source).differentiable
        notes.copy(node, output)
    return outputs


def merge_redistributes(nodes: Sequence[fx.Node], before: fx.Node) -> None:
    """Replace redistributes by one in front of ``before``, which moves all their tensors."""
    sources = [source for node in nodes for source in dataflow.operands(node)]
    transitions = [transition for node in nodes for transition in notes.note(node).transitions]
    outputs = iter(insert_redistribute(before, sources, transitions))
    for node in nodes:
        succeed_outputs(node, list(islice(outputs, len(notes.note(node).transitions))))


def keep_result(node: fx.Node) -> None:
    """In a checkpointed region, save the node's result: it must not communicate, or draw random numbers, twice."""
    if "recompute" in node.meta:
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
