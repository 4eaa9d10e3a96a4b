"""What the rings of a rewritten graph do, hop by hop: traced from the steps that run."""

from __future__ import annotations

import torch
from torch import fx

from sptransform.compiler.rewrite import Rewritten
from sptransform.diagnostics import provenance
from sptransform.graph import dataflow, notes
from sptransform.graph.edit import fake_arguments
from sptransform.graph.printer import text
from sptransform.inspection.records import ExpandedRing
from sptransform.ops.ring import trace_steps


def expanded_rings(rewritten: Rewritten) -> tuple[ExpandedRing, ...]:
    """Every ring of the graph, forward and backward."""
    ring = torch.ops.sptransform.ring_attention.default
    nodes = [node for node in rewritten.graph_module.graph.nodes if node.target is ring]
    return tuple(_expanded(node) for node in nodes if notes.note(node).mesh is not None)


def _expanded(node: fx.Node) -> ExpandedRing:
    args, kwargs = fake_arguments(node)
    rank = notes.note(node).mesh.rank
    out, lse, seed = dataflow.value(node)
    forward = trace_steps("ring_attention", rank, args, kwargs)
    # the backward reads no sinks, which come before the tables
    kwargs.pop("sinks", None)
    tables = args[6:]
    operands = [x for each in (*node.args[3:5], *node.args[6:]) for x in each]
    trained = [i for i, x in enumerate(operands) if notes.note(x).differentiable]
    backward_args = (out, *args[:5], out, lse, seed, *tables)
    backward = trace_steps("ring_attention_backward", rank, backward_args, {**kwargs, "trained": trained})
    return ExpandedRing(node.name, provenance.module_path(node), _steps(forward), _steps(backward))


def _steps(gm: fx.GraphModule) -> tuple[str, ...]:
    """One line per node, without getitem nodes."""
    nodes = [node for node in gm.graph.nodes if dataflow.projection(node) is None]
    return tuple(text(nodes, is_local=True).splitlines())
