"""How Dynamo traces custom autograd.Functions: also those that get one tensor twice, and with their names.

Dynamo refuses a function that gets one tensor as several arguments, since the backward gives each argument a gradient
of its own: ``flash_attn_varlen_func`` with one ``cu_seqlens`` for queries and keys. A copy of the second one means the
same, and its gradient is added by autograd. What a function is called, and the order of its arguments, are not in the
graph; errors name it, and rules of users are for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

# Private: Dynamo's view of a custom autograd.Function; there is no option for this.
from torch._dynamo.variables import AutogradFunctionVariable, TensorVariable

from sptransform.capture.autograd_functions import NAME, ORDER, name_of_class
from sptransform.capture.torch_versions import functions_kept_by_modules

_trace_call = AutogradFunctionVariable.call_apply


def _trace(self: Any, tx: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    seen: set[int] = set()

    def distinct(argument: Any) -> Any:
        if not isinstance(argument, TensorVariable):
            return argument
        identity = id(argument.as_proxy().node.meta["example_value"])
        if identity in seen:
            return argument.call_method(tx, "clone", [], {})
        seen.add(identity)
        return argument

    args = [distinct(x) for x in args]
    found = _trace_call(self, tx, args, {name: distinct(x) for name, x in kwargs.items()})
    graph = tx.output.current_tracer.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.higher_order.autograd_function_apply):
        if NAME not in node.meta:
            node.meta |= {NAME: name_of_class(self.fn_cls), ORDER: _order(node, args)}
    return found


def _order(call: fx.Node, args: Sequence[Any]) -> list[int]:
    """The places of the call's operands, in the order in which the user passes them; others are the last."""
    values = [x.as_proxy().node.meta["example_value"] for x in args if isinstance(x, TensorVariable)]
    places = {id(value): place for place, value in enumerate(values)}
    operands = [x.meta["example_value"] for x in call.args[2:]]
    return sorted(range(len(operands)), key=lambda i: (places.get(id(operands[i]), len(places)), i))


@contextmanager
def traced_functions() -> Iterator[None]:
    """Traces custom autograd.Functions so, inside."""
    before = AutogradFunctionVariable.call_apply
    AutogradFunctionVariable.call_apply = _trace
    try:
        with functions_kept_by_modules():
            yield
    finally:
        AutogradFunctionVariable.call_apply = before
