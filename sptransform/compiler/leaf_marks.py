"""Lets Dynamo trace ``hidden.requires_grad = True``, or ``hidden.requires_grad_()``, of a tensor that the model made.

Models write it so that layers that are recomputed find something to differentiate. It changes no value and no gradient
of a parameter, and nobody outside can read the tensor's own gradient. Of a tensor that the user passes it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Private: what Dynamo traces with.
from torch._dynamo.variables import ConstantVariable

from sptransform.capture.torch_versions import method_changed, setattr_changed

_Handler = Callable[..., Any]


def _is_mark(tensor: Any, value: Any) -> bool:
    """Whether this says that a tensor of the model requires gradients."""
    is_true = value is True or (value.is_python_constant() and value.as_python_constant() is True)
    return is_true and tensor.is_tensor() and tensor.source is None


def _setting(own: _Handler) -> _Handler:
    def set_attribute(builtin: Any, tx: Any, obj: Any, name: Any, value: Any) -> Any:
        if name.is_python_constant() and name.as_python_constant() == "requires_grad" and _is_mark(obj, value):
            _noted(obj)
            return ConstantVariable.create(None)
        return own(builtin, tx, obj, name, value)

    return set_attribute


def _marking(own: _Handler) -> _Handler:
    def mark(tensor: Any, tx: Any, requires_grad: Any = True) -> Any:
        return _noted(tensor) if _is_mark(tensor, requires_grad) else own(tensor, tx, requires_grad)

    return mark


def _noted(tensor: Any) -> Any:
    """The tensor, of which the model can read that it requires gradients, and what is computed from it does."""
    tensor.as_proxy().node.meta["example_value"].requires_grad_(True)
    tensor.requires_grad = True
    return tensor


@contextmanager
def leaf_marks_ignored() -> Iterator[None]:
    """Ignores them, inside."""
    with setattr_changed(_setting), method_changed("requires_grad_", _marking):
        yield
