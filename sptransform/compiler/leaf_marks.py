"""Lets Dynamo trace ``hidden.requires_grad = True``, or ``hidden.requires_grad_()``, of a tensor that the model made.

Models write it so that layers that are recomputed find something to differentiate. It changes no value and no gradient
of a parameter, and nobody outside can read the tensor's own gradient. Of a tensor that the user passes it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Private: where Dynamo refuses it; there is no option for this.
from torch._dynamo.variables import ConstantVariable, TensorVariable, builtin

# torch 2.13 has a class for this builtin alone
_SETS, _NAME = (
    (builtin.SetAttrBuiltinVariable, "_call_setattr")
    if hasattr(builtin, "SetAttrBuiltinVariable")
    else (builtin.BuiltinVariable, "call_setattr")
)
_set_attribute = getattr(_SETS, _NAME)
_require_grad = TensorVariable.method_requires_grad_


def _is_mark(tensor: Any, value: Any) -> bool:
    """Whether this says that a tensor of the model requires gradients."""
    is_true = value is True or (value.is_python_constant() and value.as_python_constant() is True)
    return is_true and tensor.is_tensor() and tensor.source is None


def _set(self: Any, tx: Any, obj: Any, name: Any, value: Any) -> Any:
    if name.is_python_constant() and name.as_python_constant() == "requires_grad" and _is_mark(obj, value):
        _noted(obj)
        return ConstantVariable.create(None)
    return _set_attribute(self, tx, obj, name, value)


def _mark(self: Any, tx: Any, requires_grad: Any = True) -> Any:
    return _noted(self) if _is_mark(self, requires_grad) else _require_grad(self, tx, requires_grad)


def _noted(tensor: Any) -> Any:
    """The tensor, of which the model can read that it requires gradients, and what is computed from it does."""
    tensor.as_proxy().node.meta["example_value"].requires_grad_(True)
    tensor.requires_grad = True
    return tensor


@contextmanager
def leaf_marks_ignored() -> Iterator[None]:
    """Ignores them, inside."""
    setattr(_SETS, _NAME, _set)
    TensorVariable.method_requires_grad_ = _mark
    try:
        yield
    finally:
        setattr(_SETS, _NAME, _set_attribute)
        TensorVariable.method_requires_grad_ = _require_grad
