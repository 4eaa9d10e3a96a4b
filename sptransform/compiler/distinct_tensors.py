"""Lets Dynamo trace custom autograd.Functions that get one tensor as several arguments.

Dynamo refuses those, since the backward gives each argument a gradient of its own: ``flash_attn_varlen_func`` with one
``cu_seqlens`` for queries and keys. A copy of the second one means the same, and its gradient is added by autograd.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Private: Dynamo's view of a custom autograd.Function; there is no option for this.
from torch._dynamo.variables import AutogradFunctionVariable, TensorVariable

_trace_call = AutogradFunctionVariable.call_apply


def _trace_distinct(self: Any, tx: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    seen: set[int] = set()

    def distinct(argument: Any) -> Any:
        if not isinstance(argument, TensorVariable):
            return argument
        identity = id(argument.as_proxy().node.meta["example_value"])
        if identity in seen:
            return argument.call_method(tx, "clone", [], {})
        seen.add(identity)
        return argument

    return _trace_call(self, tx, [distinct(x) for x in args], {name: distinct(x) for name, x in kwargs.items()})


@contextmanager
def distinct_tensors() -> Iterator[None]:
    """Traces, inside, such functions with a copy of each tensor that they get again."""
    before = AutogradFunctionVariable.call_apply
    AutogradFunctionVariable.call_apply = _trace_distinct
    try:
        yield
    finally:
        AutogradFunctionVariable.call_apply = before
