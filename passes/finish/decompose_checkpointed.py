"""Let selective checkpointing see the ops it decides on: those that run, not those that were captured.

A policy of ``create_selective_checkpoint_contexts`` is asked about ``aten.mm``; the graph has ``aten.linear``. Before,
in a region with a policy that saves ``aten.mm``::

    %y = aten.linear(%x, %w)                                            PREFER_RECOMPUTE

after::

    %t = aten.t(%w)                                                     PREFER_RECOMPUTE
    %v = aten.view(%x, [64, 16])                                        PREFER_RECOMPUTE
    %mm = aten.mm(%v, %t)                                               MUST_SAVE
    %y = aten._unsafe_view(%mm, [2, 32, 8])                             PREFER_RECOMPUTE

1. An op that runs as several becomes those, each tagged by torch's own mode for the region; others are only tagged.
2. Communication is saved whatever the policy says, see :mod:`sptransform.passes.distribute.lower_redistributes`.
3. An op that decomposes into writes (dropout) or constants stays one node: it is recomputed. So does a custom
   autograd.Function, whose backward is not that of the ops it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from sptransform.engine.bodies import has_body
from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow, notes
from sptransform.graph.edit import rename, succeed
from sptransform.graph.reruns import below_autograd
from sptransform.passes.distribute.localize import ranks_of
from sptransform.sharding.sizes import SymbolicSizeError


@dataclass(frozen=True)
class DecomposeCheckpointed(Pass):
    requires = frozenset({"lowered", "local"})
    ensures = frozenset({"functional", "lowered", "local"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        policies = notes.take_policies(graph)
        if not policies:
            return
        with ranks_of(graph, context):
            for node in graph.nodes:  # not a copy: decomposing a node erases its getitem nodes
                policy = policies.get(node.meta.get("ac_graph_id"))
                if policy is not None and node.meta["recompute"] is not CheckpointPolicy.MUST_SAVE:
                    if dataflow.handles_tensors(node) and not has_body(node):
                        # autocast decides into which ops a node decomposes
                        with notes.region_of(node).autocast():
                            _open(node, policy)


def _open(node: fx.Node, policy: Any) -> None:
    traced = _trace(node, policy)
    calls = [inner for inner in traced.nodes if inner.op == "call_function"]
    (returned,) = traced.output_node().args
    if len(calls) == 1 and calls[0].target is node.target:
        node.meta["recompute"] = calls[0].meta.get("recompute", CheckpointPolicy.PREFER_RECOMPUTE)
        return
    if any(inner.op == "get_attr" or dataflow.writes(inner) for inner in traced.nodes) or not calls:
        return
    placeholders = [inner for inner in traced.nodes if inner.op == "placeholder"]
    copies = dict(zip(placeholders, node.all_input_nodes, strict=True))
    if isinstance(returned, fx.Node) and returned in copies:
        return
    for inner in calls:
        with node.graph.inserting_before(node):
            copies[inner] = node.graph.node_copy(inner, copies.__getitem__)
        copies[inner].meta = {"val": inner.meta["val"]}
        notes.copy(node, copies[inner])
        notes.note(copies[inner]).differentiable = notes.note(node).differentiable
        copies[inner].meta["recompute"] = inner.meta.get("recompute", CheckpointPolicy.PREFER_RECOMPUTE)
        rename(copies[inner], inner.name)
    if isinstance(returned, fx.Node):
        _state(copies[returned], node, slice(None))
        succeed(node, copies[returned])
        return
    for user in list(node.users):
        _, index = dataflow.projection(user)
        _state(copies[returned[index]], node, slice(index, index + 1))
        succeed(user, copies[returned[index]])
    node.graph.erase_node(node)


def _trace(node: fx.Node, policy: Any) -> fx.Graph:
    """What the node's op runs below autograd and autocast, each op tagged by the region's policy."""
    inputs = node.all_input_nodes
    if any(isinstance(size, torch.SymInt) for x in inputs for value in dataflow.values(x) for size in value.shape):
        raise SymbolicSizeError("a selective checkpoint policy is asked about ops on tensors of known size")

    mode = dataflow.values(node)[0].fake_mode
    with mode, fx.traceback.preserve_node_meta(), policy:
        return below_autograd(node)


def _state(new: fx.Node, old: fx.Node, which: slice) -> None:
    """Copy to ``new`` the local types and placements of those outputs of ``old`` that ``which`` picks."""
    stated, placements = notes.note(old).local_types, notes.note(old).placements
    notes.note(new).local_types = None if stated is None else stated[which]
    notes.note(new).placements = None if placements is None else placements[which]
    earlier = notes.note(old).earlier
    notes.note(new).earlier = tuple(None if placed is None else placed[which] for placed in earlier)
