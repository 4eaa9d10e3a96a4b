"""The passes' notes on graph nodes (``node.meta["sptransform"]``). Only this module reads and writes that key."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from sptransform.graph.dataflow import operands, projection
from sptransform.graph.regions import Region
from sptransform.rules.decision import Decision
from sptransform.rules.rule import OpRule
from sptransform.rules.table import Sends
from sptransform.sharding.mesh import Mesh
from sptransform.sharding.placement import Placement, Shard
from sptransform.sharding.sizes import Size

_KEY = "sptransform"
_AROUND = "sptransform_region"


@dataclass(frozen=True)
class Stored:
    """A tensor sharded over a group: each rank has its ``torch.chunk`` of ``dim``."""

    dim: int
    group: str


@dataclass
class Note:
    """What the passes know about a node. None means "not annotated yet" or "does not apply"."""

    differentiable: bool | None = None
    input_name: str | None = None  # placeholders: the user's name for it
    is_parameter: bool = False  # placeholders
    is_buffer: bool = False  # placeholders
    stored: tuple[Stored, ...] = ()  # placeholders: how it is sharded, outermost mesh dim first
    rule: OpRule | None = None
    decision: Decision | None = None
    decided: tuple[tuple[OpRule, Decision], ...] = ()  # of attention: rule and decision on earlier mesh dims
    placements: tuple[Placement, ...] | None = None  # one per output of the node
    earlier: tuple[tuple[Placement, ...] | None, ...] = ()  # the placements on earlier mesh dims
    local_types: tuple[tuple[tuple[Size, ...], torch.dtype], ...] | None = None  # expected (shape, dtype) per output
    transitions: tuple[tuple[Placement, Placement], ...] = ()  # redistribute nodes: (from, to) per tensor
    mesh: Mesh | None = None  # lowered nodes that communicate: over these ranks
    sends: Sends | None = None  # of an op that communicates itself
    region: Region | None = None  # cached by region_of


def note(node: fx.Node) -> Note:
    """The node's note, made on first access."""
    found = node.meta.get(_KEY)
    if found is None:
        found = node.meta[_KEY] = Note()
    return found


def placement(node: fx.Node) -> Placement | None:
    """Placement of the node's output; for a getitem, of the output it picks."""
    picked = projection(node)
    if picked is not None:
        placements = note(picked[0]).placements
        return None if placements is None else placements[picked[1]]
    placements = note(node).placements
    return None if placements is None else placements[0]


def placement_by_dim(node: fx.Node, output: int = 0) -> tuple[Placement | None, ...]:
    """Placement of an output on every mesh dim that was distributed, the outermost first; None where nobody noted it.

    A move on an inner mesh dim leaves the placement on the outer one as it was.
    """
    picked = projection(node)
    if picked is not None:
        return placement_by_dim(*picked)
    found = note(node)
    own = _of_output(found.placements, output)
    if found.earlier:
        return (*(_of_output(placements, output) for placements in found.earlier), own)
    # an input knows on how many mesh dims the graph was distributed before
    num_earlier = len(note(next(iter(node.graph.nodes))).earlier)
    if num_earlier and found.transitions:
        return (*placement_by_dim(operands(node)[output])[:num_earlier], own)
    return (*[None] * num_earlier, own)


def _of_output(placements: tuple[Placement, ...] | None, output: int) -> Placement | None:
    return None if placements is None or output >= len(placements) else placements[output]


def set_placement(node: fx.Node, *placements: Placement) -> None:
    note(node).placements = placements


def region_of(node: fx.Node) -> Region:
    """The autocast and grad-mode region that the node is in.

    Results are cached on the nodes: passes may add nodes, but must not move nodes across the borders of a region.
    """
    unknown = []
    at = node
    while at.op != "root" and note(at).region is None:
        unknown.append(at)
        at = at.prev
    for following in reversed(unknown):
        before = following.prev
        is_first = before.op == "root"
        note(following).region = region_around(node.graph) if is_first else note(before).region.after(before)
    return note(node).region


def region_around(graph: fx.Graph) -> Region:
    """What is in force where the graph is called: a user's ``no_grad`` around the call is no node of it."""
    owner = graph.owning_module
    return Region() if owner is None else owner.meta.get(_AROUND, Region())


def set_region_around(graph: fx.Graph, region: Region) -> None:
    graph.owning_module.meta[_AROUND] = region


def outermost(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Map each node to the node that opens its outermost region; outside of regions, to itself."""
    found: dict[fx.Node, fx.Node] = {}
    around, opening = region_around(graph), None
    for node in graph.nodes:
        if region_of(node) == around:
            opening = node
        found[node] = opening
    return found


def copy(source: fx.Node, target: fx.Node) -> None:
    """Copy source line, module path, checkpointing tags and user annotations from ``source`` to ``target``."""
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "recompute", "ac_graph_id", "custom"):
        if key in source.meta:
            target.meta[key] = source.meta[key]


def copy_note(source: fx.Node, target: fx.Node) -> None:
    """Give ``target``, another form of ``source``, a copy of its note."""
    target.meta[_KEY] = replace(note(source), region=None)


def fork(source: fx.Node, target: fx.Node) -> None:
    """Give ``target``, another form of ``source``, all its metadata and a copy of its note."""
    target.meta = dict(source.meta)
    copy_note(source, target)


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm`` with a graph of its own, whose nodes have notes of their own. Fake values and constants are shared."""
    own = fx.GraphModule(gm, deepcopy(gm.graph))
    own.meta = dict(gm.meta)
    for node in own.graph.nodes:
        if _KEY in node.meta:
            node.meta[_KEY] = replace(note(node))
    return own


def derive_differentiable(node: fx.Node) -> None:
    """Note that the node is differentiable if one of its inputs is."""
    note(node).differentiable = any(note(x).differentiable for x in node.all_input_nodes)


def passes_gradients(node: fx.Node) -> bool:
    """Whether gradients of the node's readers reach its inputs: it does not detach them, nor stand in ``no_grad``."""
    if not any(note(x).differentiable for x in node.all_input_nodes):
        return True
    if not any(region_of(reader).grad_enabled for reader in node.users):
        return True  # they have none
    return bool(note(node).differentiable) and region_of(node).grad_enabled


def is_even(graph: fx.Graph) -> bool:
    """Whether all ranks have equal shares of every shard in the graph, and do the same to them."""
    every = [note(node) for node in graph.nodes]
    ends = [end for found in every for transition in found.transitions for end in transition]
    placements = [*ends, *(placement for found in every for placement in found.placements or ())]
    is_even = all(placement.partition.is_even for placement in placements if isinstance(placement, Shard))
    return is_even and not any(map(_differs_at_borders, every))


def _differs_at_borders(found: Note) -> bool:
    """Whether what a rank does depends on where its part of the node's factor begins and ends."""
    if found.rule is None or found.decision is None:
        return False
    resized = ((found.decision.partition_of(name), resize) for (_, _, name), resize in found.rule.resize.items())
    return any(partition is not None and not resize.is_alike(partition) for partition, resize in resized)


def forget_placements(graph: fx.Graph, is_first: bool) -> None:
    """Reset the notes before placement on the next mesh dim. Keeps what no mesh dim changes, and what was sent.

    Placements become those of an earlier mesh dim, unless the next one ``is_first``.
    """
    for node in graph.nodes:
        kept = ("differentiable", "input_name", "is_parameter", "is_buffer", "stored", "transitions", "mesh", "sends")
        found = note(node)
        earlier = () if is_first else (*found.earlier, found.placements)
        node.meta[_KEY] = Note(
            **{name: getattr(found, name) for name in kept}, decided=decided(node), earlier=earlier
        )


def decided(node: fx.Node) -> tuple[tuple[OpRule, Decision], ...]:
    """The rule and the decision of an attention node on every mesh dim that is distributed; empty for other nodes."""
    found = note(node)
    is_new = found.rule is not None and found.decision is not None and found.rule.roles
    return (*found.decided, (found.rule, found.decision)) if is_new else found.decided


def give_policies(graph: fx.Graph, policies: dict[int, Any]) -> None:
    """Attach to the graph the policies of its selectively checkpointed regions, by ``ac_graph_id``."""
    graph.owning_module.meta[_KEY] = policies


def take_policies(graph: fx.Graph) -> dict[int, Any]:
    """Detach and return what :func:`give_policies` attached."""
    return graph.owning_module.meta.pop(_KEY, {})
