"""The class of parameters of which ranks keep parts: DTensors that modules outside of the model can read.

A module that was not parallelized may hold such a parameter, as a head outside of a language model holds its
embedding's. There it meets plain tensors, which every rank has. Torch refuses to mix the two; here the function reads
the full parameter, and each rank keeps its part of the gradient.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from sptransform.parameters.parts import full_tensor

_IN_PLACE = {"__setitem__", "__set__"} | {
    name for name in vars(operator) if name.startswith("__i") and f"__{name[3:]}" in vars(operator)  # __iadd__, __add__
}


class SharedParameter(DTensor):
    """A DTensor. Functions of it and of plain tensors that are no single numbers see the full tensor."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not all(issubclass(cls, each) for each in types):
            return NotImplemented  # what a model returns in parts knows what to do
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        is_mixed = any(isinstance(x, Tensor) and not isinstance(x, DTensor) and x.ndim for x in leaves)
        if is_mixed and not is_in_place(func, kwargs):
            args, kwargs = pytree.tree_map(lambda x: full_tensor(x) if isinstance(x, cls) else x, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        with _as_dtensor(self):
            copied = Tensor.__deepcopy__(self, memo)
        copied.__class__ = type(self)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        with _as_dtensor(self):  # files name torch's class
            return DTensor.__reduce_ex__(self, protocol)


@contextmanager
def _as_dtensor(x: SharedParameter) -> Iterator[None]:
    """Within the block ``x`` is of torch's own class."""
    x.__class__ = DTensor
    try:
        yield
    finally:
        x.__class__ = SharedParameter


def is_in_place(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of a torch function writes into an argument, by how torch names what does."""
    name = getattr(func, "__name__", "").partition(".")[0]  # of an op, without its overload
    writes = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    return writes or kwargs.get("out") is not None or bool(kwargs.get("inplace"))
