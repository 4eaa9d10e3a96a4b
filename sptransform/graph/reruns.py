"""One node's op run by itself: on fakes, to see what it does below autograd, or on values on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from sptransform.graph import dataflow, notes
from sptransform.rules.rule import map_nodes


def below_autograd(node: fx.Node) -> fx.Graph:
    """What the node's op runs below autograd and autocast, as a graph of the node's inputs.

    The caller has entered the fake mode of the graph, and what else is to see these ops.
    """
    inputs = node.all_input_nodes

    def call(*values: Any) -> Any:
        at = dict(zip(inputs, values, strict=True))
        args, kwargs = map_nodes((node.args, dict(node.kwargs)), lambda x: at[x] if isinstance(x, fx.Node) else x)
        return node.target(*args, **kwargs)

    with torch.enable_grad():
        return make_fx(call, _allow_non_fake_inputs=True)(*map(_leaf, inputs)).graph


def _leaf(node: fx.Node) -> Any:
    """A value to trace with; what an op does may depend on whether a gradient is wanted."""
    value = dataflow.value(node)
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().requires_grad_(notes.note(node).differentiable and value.dtype.is_floating_point)


def arguments_on_cpu(node: fx.Node, values: Mapping[fx.Node, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The node's arguments, with values on the CPU for the nodes, and the CPU for devices."""

    def put(x: Any) -> Any:
        if isinstance(x, fx.Node):
            return values[x]
        return torch.device("cpu") if isinstance(x, torch.device) else x

    return map_nodes((node.args, dict(node.kwargs)), put)
