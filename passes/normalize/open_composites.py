"""Replace ops that have no rule, and that are other ops by definition, by those.

Before::

    %z = aten.multiply(%x, %y)
    %u = aten.movedim(%z, 1, 2)

after::

    %z = aten.mul(%x, %y)
    %u = aten.permute(%z, [0, 2, 1])

1. An op with a rule for this call stays: attention and linears are composites, too.
2. An op that torch defines by others (``CompositeImplicitAutograd``) becomes these: below autograd it is not seen. Its
   gradient is theirs on one device too. Ops of others may have a gradient of their own, and stay.
3. A composite stays if it writes, makes constants, or has parts without a rule; under autocast, which treats it as one
   op; and on open lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow, notes
from sptransform.graph.calls import rule_at
from sptransform.graph.edit import emit_like, succeed, succeed_outputs
from sptransform.graph.reruns import below_autograd
from sptransform.rules.table import RuleTable


@dataclass(frozen=True)
class OpenComposites(Pass):
    requires = frozenset({"functional"})
    ensures = frozenset({"functional"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        for node in list(graph.nodes):
            if not dataflow.handles_tensors(node) or getattr(node.target, "namespace", None) != "aten":
                continue
            if dataflow.writes(node) or (node.target in context.rules and rule_at(node, context.rules) is not None):
                continue
            if (traced := _traced(node)) is not None:
                _put_in_place(node, traced, context.rules)


def _traced(node: fx.Node) -> fx.Graph | None:
    """What the op is, as a graph of its tensors; None if it stays."""
    values = [value for x in (node, *node.all_input_nodes) for value in dataflow.values(x)]
    if any(isinstance(size, torch.SymInt) for value in values for size in value.shape):
        return None

    with notes.region_of(node).autocast():
        if any(torch.is_autocast_enabled(value.device.type) for value in dataflow.values(node)):
            return None
        with dataflow.fake_mode(node.graph):
            traced = below_autograd(node)
    calls = traced.find_nodes(op="call_function", target=node.target)
    stays = any(inner.op == "get_attr" or dataflow.writes(inner) for inner in traced.nodes)
    return None if calls or stays else traced


def _put_in_place(node: fx.Node, traced: fx.Graph, rules: RuleTable) -> None:
    placeholders = traced.find_nodes(op="placeholder")
    copies = dict(zip(placeholders, node.all_input_nodes, strict=True))
    emitted = []
    for inner in traced.nodes:
        if inner.op == "call_function":
            args, kwargs = fx.map_arg((inner.args, dict(inner.kwargs)), copies.__getitem__)
            copies[inner] = emit_like(node, inner.target, *args, **kwargs)
            emitted.append(copies[inner])
    if any(dataflow.handles_tensors(new) and rule_at(new, rules) is None for new in emitted):
        for new in reversed(emitted):
            node.graph.erase_node(new)
        return
    (returned,) = traced.output_node().args
    if not isinstance(returned, fx.Node):
        succeed_outputs(node, [copies[each] for each in returned])
    elif returned in placeholders:
        node.replace_all_uses_with(copies[returned])
        node.graph.erase_node(node)
    else:
        succeed(node, copies[returned])
