"""The class of parameters of which ranks keep parts: DTensors that code outside of the model can read.

A module that was not parallelized may hold such a parameter, as a head outside of a language model holds its
embedding's. There it meets plain tensors, which every rank has. Torch refuses to mix the two; here the function reads
the full parameter, and each rank keeps its part of the gradient.

A penalty on parameters (``weight.norm()``) is part of a loss. Torch's own functions would make it a term of a sum, of
which ``item()`` reads this rank's, and whose gradient does not meet that of a plain loss. So functions of parameters
that need gradients are rewritten as those of what the model returns (:mod:`sptransform.compiler.calls_behind`). Others
(optimizers, statistics, those of gradients) are torch's own, and sums over ranks are taken before a number leaves.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

# Private API: whether Dynamo or the library traces
from torch._guards import TracingContext
from torch.distributed.tensor import DTensor, Replicate
from torch.utils import _pytree as pytree

from sptransform.parameters.parts import full_tensor

_IN_PLACE = {"__setitem__", "__set__"} | {
    name for name in vars(operator) if name.startswith("__i") and f"__{name[3:]}" in vars(operator)  # __iadd__, __add__
}
# attributes that are computed, by the functions that compute them
COMPUTED: dict[Any, Callable[..., Any]] = {
    Tensor.H.__get__: torch.adjoint,
    Tensor.T.__get__: Tensor.t,
    Tensor.data.__get__: Tensor.detach,
    Tensor.imag.__get__: torch.imag,
    Tensor.mH.__get__: torch.adjoint,
    Tensor.mT.__get__: lambda x: x.transpose(-2, -1),
    Tensor.real.__get__: torch.real,
}
# what concerns the object, its memory, its full shape, or its place in autograd's graph
_OF_THE_OBJECT = {
    *("__get__", "__hash__", "__len__", "__repr__", "backward", "data_ptr", "dim", "element_size", "get_device"),
    *("grad", "is_complex", "is_contiguous", "is_floating_point", "is_inference", "is_pinned", "is_shared"),
    *("is_signed", "ndimension", "nelement", "numel", "register_post_accumulate_grad_hook", "retain_grad", "size"),
    *("storage", "storage_offset", "stride", "type", "untyped_storage"),
    "_has_compatible_shallow_copy_type",  # asked of a parameter whose module is moved
}
# what gives gradients, which are cut as their tensors are
_OF_GRADIENTS = {Tensor.grad.__get__, torch.autograd.grad}
# by which numbers leave torch
_OF_VALUES = {
    *("__array__", "__bool__", "__complex__", "__contains__", "__float__", "__format__", "__index__", "__int__"),
    *("allclose", "equal", "item", "numpy", "tolist"),
}


class SharedParameter(DTensor):
    """A DTensor. Functions of it and of plain tensors that are no single numbers see the full tensor.

    ``calls`` runs any other function of what needs a gradient, given its positional and keyword arguments.
    """

    calls: ClassVar[Callable[..., Any]]

    @staticmethod
    def called_by(calls: Callable[..., Any]) -> type[SharedParameter]:
        """The class of parameters whose functions ``calls`` runs."""
        return type("SharedParameter", (SharedParameter,), {"calls": staticmethod(calls), "__module__": __name__})

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not all(issubclass(each, SharedParameter) or issubclass(cls, each) for each in types):
            return NotImplemented  # what a model returns in parts knows what to do
        kwargs = kwargs or {}
        func = COMPUTED.get(func, func) if getattr(func, "__name__", "") == "__get__" else func
        if func is Tensor.register_hook:
            return _as_torch(func, (args[0], cls._on_kept(*args[1:], **kwargs)), {})
        if is_in_place(func, kwargs) or _name(func) in _OF_THE_OBJECT:
            found = _as_torch(func, args, kwargs)
            return pytree.tree_map(cls._kept, found) if func in _OF_GRADIENTS else found
        shared, plain = _tensors(args, kwargs)
        has_gradient = torch.is_grad_enabled() and not _is_detached(func) and TracingContext.try_get() is None
        if has_gradient and any(x.requires_grad for x in shared) and not any(x.ndim for x in plain):
            return cls.calls(func, args, kwargs)
        if _name(func) in _OF_VALUES or any(x.ndim or (has_gradient and x.requires_grad) for x in plain):
            args, kwargs = pytree.tree_map(_whole, (args, kwargs))
        found = _as_torch(func, args, kwargs)
        return found if TracingContext.try_get() is not None else pytree.tree_map(cls._kept, found)

    @classmethod
    def _kept(cls, x: Any) -> Any:
        """What torch's own function returned: functions of it are as functions of a parameter."""
        if type(x) is DTensor:
            x.__class__ = cls
        return x

    @classmethod
    def _on_kept(cls, hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda grad: hook(cls._kept(grad))

    def __deepcopy__(self, memo: Any) -> Any:
        with as_dtensors([self]):
            copied = Tensor.__deepcopy__(self, memo)
        copied.__class__ = type(self)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        with as_dtensors([self]):  # files name torch's class
            return DTensor.__reduce_ex__(self, protocol)


@contextmanager
def as_dtensors(tensors: Iterable[Any]) -> Iterator[None]:
    """Within the block those of ``tensors`` that are parameters in parts are of torch's own class."""
    shared = {id(x): (x, type(x)) for x in tensors if isinstance(x, SharedParameter)}.values()
    for x, _ in shared:
        x.__class__ = DTensor
    try:
        yield
    finally:
        for x, kind in shared:
            x.__class__ = kind


def _as_torch(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _tensors(args: Any, kwargs: Any) -> tuple[list[SharedParameter], list[Tensor]]:
    """Those in parts, and those that every rank has."""
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    shared = [x for x in tensors if isinstance(x, SharedParameter)]
    return shared, [x for x in tensors if not isinstance(x, DTensor)]


def _whole(x: Any) -> Any:
    return full_tensor(summed(x)) if isinstance(x, SharedParameter) else x


def summed(x: DTensor) -> DTensor:
    """``x``, of which sums over ranks are taken."""
    if not any(placement.is_partial() for placement in x.placements):
        return x
    return x.redistribute(placements=[Replicate() if each.is_partial() else each for each in x.placements])


def _is_detached(func: Callable[..., Any]) -> bool:
    """Whether a result never has a gradient, by how torch names such functions: ``zeros_like``, ``new_zeros``."""
    return _name(func) == "detach" or _name(func).endswith("_like") or _name(func).startswith("new_")


def _name(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", "").partition(".")[0]  # of an op, without its overload


def is_in_place(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of a torch function writes into an argument, by how torch names what does."""
    name = _name(func)
    writes = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    return writes or kwargs.get("out") is not None or bool(kwargs.get("inplace"))
