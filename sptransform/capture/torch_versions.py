"""What depends on the version of torch: capture, and what changes Dynamo, ask here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from typing import Any

import torch

# Private: Dynamo's view of tensors, methods and of setattr; there is no option for what is changed.
from torch._dynamo.variables import AutogradFunctionVariable, TensorVariable, UserMethodVariable, builtin

# since torch 2.13 a class of its own
_SETATTR, _SETATTR_NAME = (
    (builtin.SetAttrBuiltinVariable, "_call_setattr")
    if hasattr(builtin, "SetAttrBuiltinVariable")
    else (builtin.BuiltinVariable, "call_setattr")
)
# since torch 2.14 methods are looked up in a table; before, as attributes
_METHODS: dict[str, Any] = getattr(TensorVariable, "tp_methods", {})

Change = Callable[[Callable[..., Any]], Callable[..., Any]]


def setattr_changed(change: Change) -> AbstractContextManager[None]:
    """Inside, Dynamo traces ``setattr(x, name, value)`` with what ``change`` makes of ``own(self, tx, *args)``."""
    return _changed(_SETATTR, _SETATTR_NAME, change)


def method_changed(name: str, change: Change) -> AbstractContextManager[None]:
    """Inside, Dynamo traces a tensor's method with what ``change`` makes of ``own(self, tx, *args, **kwargs)``."""
    if name in _METHODS:
        return _changed(_METHODS[name], "handler", change)
    return _changed(TensorVariable, f"method_{name}", change)


@contextmanager
def _changed(holder: Any, attribute: str, change: Change) -> Iterator[None]:
    own = getattr(holder, attribute)
    setattr(holder, attribute, change(own))
    try:
        yield
    finally:
        setattr(holder, attribute, own)


def functions_kept_by_modules() -> AbstractContextManager[None]:
    """Inside, Dynamo knows ``self.f(x)`` of a module whose ``self.f`` is the ``apply`` of an autograd.Function.

    Torch 2.11 would trace what ``apply`` does in Python.
    """

    def change(own: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
            is_apply = self.fn is torch.autograd.Function.apply.__func__
            if is_apply and isinstance(self.obj, AutogradFunctionVariable):
                return self.obj.call_method(tx, "apply", list(args), kwargs)
            return own(self, tx, args, kwargs)

        return call

    return _changed(UserMethodVariable, "call_function", change)


def own_limit() -> dict[str, Any]:
    """Arguments of ``torch.compile``: its compiles count for no other call of it on the same code, as of another model.

    Empty before torch has that. All models of one class then share Dynamo's limit.
    """
    return {"isolate_recompiles": True} if "isolate_recompiles" in signature(torch.compile).parameters else {}


def devices_as_written() -> AbstractContextManager[Any]:
    """Inside, graphs that are traced hold devices, also where the user says ``compile_on_one_rank`` (since torch 2.14).

    That puts a node in a device's place, which is no tensor and has no placement. The inner backend, which traces the
    rewritten graph outside of this, puts it there all the same.
    """
    if not hasattr(torch.compiler.config, "compile_on_one_rank"):
        return nullcontext()
    return torch.compiler.config.patch(compile_on_one_rank=False)


@contextmanager
def metrics_unsaid() -> Iterator[None]:
    """Inside, torch 2.11 logs no error at each compile: its metrics cannot sort the functions that are ignored."""
    log = logging.getLogger("torch._dynamo.metrics_context")

    def is_said(record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], TypeError))

    log.addFilter(is_said)
    try:
        yield
    finally:
        log.removeFilter(is_said)
