"""The only reader and writer of what the passes note on a graph's nodes (``node.meta["sptransform"]``)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from sptransform.graph.dataflow import projection
from sptransform.graph.regions import OUTSIDE, Region
from sptransform.rules.decision import Decision
from sptransform.rules.rule import OpRule
from sptransform.sharding.mesh import Mesh
from sptransform.sharding.placement import Placement, Shard
from sptransform.sharding.sizes import Size

_KEY = "sptransform"


@dataclass(frozen=True)
class Stored:
    """A tensor of which each rank of a group has its part: the chunk of ``dim`` that ``torch.chunk`` cuts."""

    dim: int
    group: str


@dataclass
class Note:
    """What the passes know of a node. None always means "not annotated yet"."""

    differentiable: bool = False
    input_name: str | None = None  # of a placeholder: what the user calls it
    is_parameter: bool = False  # of a placeholder
    stored: tuple[Stored, ...] = ()  # of a placeholder: how ranks share it, the outermost mesh dim first
    rule: OpRule | None = None
    decision: Decision | None = None
    placements: tuple[Placement, ...] | None = None  # one per output of the node
    local_types: tuple[tuple[tuple[Size, ...], torch.dtype], ...] | None = None  # stated shape, dtype per output
    transitions: tuple[tuple[Placement, Placement], ...] = ()  # of a redistribute node: (from, to) per tensor
    mesh: Mesh | None = None  # of a lowered node that communicates: over which ranks
    region: Region | None = None  # once asked for, see region_of


def note(node: fx.Node) -> Note:
    """The node's note, made on first access."""
    found = node.meta.get(_KEY)
    if found is None:
        found = node.meta[_KEY] = Note()
    return found


def placement(node: fx.Node) -> Placement | None:
    """Placement of the node's output (of the picked one, where the node picks one of several)."""
    picked = projection(node)
    if picked is not None:
        placements = note(picked[0]).placements
        return None if placements is None else placements[picked[1]]
    placements = note(node).placements
    return None if placements is None else placements[0]


def set_placement(node: fx.Node, *placements: Placement) -> None:
    note(node).placements = placements


def region_of(node: fx.Node) -> Region:
    """The autocast and grad-mode region the node stands in. Passes may add nodes, but move none of a region.

    What is found is kept, so that each node is looked at once.
    """
    unknown = []
    at = node
    while at.op != "root" and note(at).region is None:
        unknown.append(at)
        at = at.prev
    for following in reversed(unknown):
        before = following.prev
        note(following).region = OUTSIDE if before.op == "root" else note(before).region.after(before)
    return note(node).region


def outermost(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Every node, or the node that opens the outermost region it stands in."""
    found: dict[fx.Node, fx.Node] = {}
    opening = None
    for node in graph.nodes:
        if region_of(node) == OUTSIDE:
            opening = node
        found[node] = opening
    return found


def copy(source: fx.Node, target: fx.Node) -> None:
    """Let ``target``, made in ``source``'s stead, keep source line, module path, autograd and recompute tags."""
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "recompute", "ac_graph_id", "custom"):
        if key in source.meta:
            target.meta[key] = source.meta[key]


def fork(source: fx.Node, target: fx.Node) -> None:
    """Let ``target``, another form of ``source``, start with all that is known of it, and a note of its own."""
    target.meta = {**source.meta, _KEY: replace(note(source), region=None)}


def is_even(graph: fx.Graph) -> bool:
    """Whether every rank has an equal share of whatever is cut."""
    every = [note(node) for node in graph.nodes]
    ends = [end for found in every for transition in found.transitions for end in transition]
    placements = [*ends, *(placement for found in every for placement in found.placements or ())]
    return all(placement.partition.is_even for placement in placements if isinstance(placement, Shard))


def forget_placements(graph: fx.Graph) -> None:
    """Keep of the notes what does not depend on a mesh dim, and what was sent: the graph is about to be placed anew."""
    for node in graph.nodes:
        kept = ("differentiable", "input_name", "is_parameter", "stored", "transitions", "mesh")
        node.meta[_KEY] = Note(**{name: getattr(note(node), name) for name in kept})


def give_policies(graph: fx.Graph, policies: dict[int, Any]) -> None:
    """Keep with the graph what decides in its selectively checkpointed regions, by their ``ac_graph_id``."""
    graph.owning_module.meta[_KEY] = policies


def take_policies(graph: fx.Graph) -> dict[int, Any]:
    """What :func:`give_policies` kept; it is kept no longer."""
    return graph.owning_module.meta.pop(_KEY, {})
