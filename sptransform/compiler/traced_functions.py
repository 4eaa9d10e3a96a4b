"""How Dynamo traces custom autograd.Functions: also those that get one tensor twice, and with their names.

Dynamo refuses a function that gets one tensor as several arguments, since the backward gives each argument a gradient of
its own: ``flash_attn_varlen_func`` with one ``cu_seqlens`` for queries and keys. A copy of the second one means the same,
and its gradient is added by autograd. What a function is called is not in the graph; errors and rules of users name it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Private: Dynamo's view of a custom autograd.Function; there is no option for this.
from torch._dynamo.variables import AutogradFunctionVariable, TensorVariable

from sptransform.capture.autograd_functions import NAME, name_of_class

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

    found = _trace_call(self, tx, [distinct(x) for x in args], {name: distinct(x) for name, x in kwargs.items()})
    graph = tx.output.current_tracer.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.higher_order.autograd_function_apply):
        node.meta.setdefault(NAME, name_of_class(self.fn_cls))
    return found


@contextmanager
def traced_functions() -> Iterator[None]:
    """Traces custom autograd.Functions so, inside."""
    before = AutogradFunctionVariable.call_apply
    AutogradFunctionVariable.call_apply = _trace
    try:
        yield
    finally:
        AutogradFunctionVariable.call_apply = before
