"""What the rings of a rewritten graph do, hop by hop: traced from the steps that run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from sptransform import annotations
from sptransform.explain.explanation import ExpandedRing
from sptransform.ops.ring import trace_steps
from sptransform.printer import text
from sptransform.rewriter import fake_arguments

if TYPE_CHECKING:
    from sptransform.rewrite import Rewritten


def expanded_rings(rewritten: Rewritten) -> tuple[ExpandedRing, ...]:
    """Every ring of the graph, forward and backward."""
    ring = torch.ops.sptransform.ring_attention.default
    nodes = [node for node in rewritten.graph_module.graph.nodes if node.target is ring]
    return tuple(_expanded(node) for node in nodes if annotations.note(node).mesh is not None)


def _expanded(node: fx.Node) -> ExpandedRing:
    args, kwargs = fake_arguments(node)
    rank = annotations.note(node).mesh.rank
    out, lse, seed = annotations.value(node)
    forward = trace_steps("ring_attention", rank, args, kwargs)
    backward = trace_steps("ring_attention_backward", rank, (out, *args, out, lse, seed), kwargs)
    return ExpandedRing(node.name, annotations.module_path(node), _steps(forward), _steps(backward))


def _steps(gm: fx.GraphModule) -> tuple[str, ...]:
    """One line a node, without what only takes tuples apart."""
    nodes = [node for node in gm.graph.nodes if annotations.projection(node) is None]
    return tuple(text(nodes, is_local=True).splitlines())
