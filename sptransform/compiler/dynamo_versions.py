"""Where Dynamo does what this package changes, which depends on the version of torch: no other file asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Private: Dynamo's view of tensors and of setattr; there is no option for what is changed.
from torch._dynamo.variables import TensorVariable, builtin

# since torch 2.13 a class of its own
_SETATTR, _SETATTR_NAME = (
    (builtin.SetAttrBuiltinVariable, "_call_setattr")
    if hasattr(builtin, "SetAttrBuiltinVariable")
    else (builtin.BuiltinVariable, "call_setattr")
)
# since torch 2.14 methods are looked up in a table; before, as attributes
_METHODS: dict[str, Any] = getattr(TensorVariable, "tp_methods", {})

Change = Callable[[Callable[..., Any]], Callable[..., Any]]


@contextmanager
def setattr_changed(change: Change) -> Iterator[None]:
    """Inside, Dynamo traces ``setattr(x, name, value)`` with what ``change`` makes of ``own(self, tx, *args)``."""
    own = getattr(_SETATTR, _SETATTR_NAME)
    setattr(_SETATTR, _SETATTR_NAME, change(own))
    try:
        yield
    finally:
        setattr(_SETATTR, _SETATTR_NAME, own)


@contextmanager
def method_changed(name: str, change: Change) -> Iterator[None]:
    """Inside, Dynamo traces a tensor's method with what ``change`` makes of ``own(self, tx, *args, **kwargs)``."""
    if name in _METHODS:
        holder, attribute = _METHODS[name], "handler"
    else:
        holder, attribute = TensorVariable, f"method_{name}"
    own = getattr(holder, attribute)
    setattr(holder, attribute, change(own))
    try:
        yield
    finally:
        setattr(holder, attribute, own)
