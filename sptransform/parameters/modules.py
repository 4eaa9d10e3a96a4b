"""Sharded parameters: optimizers and checkpoints see DTensors, the model sees full tensors.

All parameters of the model become DTensors, since optimizers and gradient clipping do not take a mix of DTensors and
plain tensors. A module that owns parameters gets a class of the same name, whose forward sees full tensors, also where
it is called by itself, such as an embedding that is read before the model is called. Under Dynamo that is one node,
:func:`full_tensor`. Capture replaces this node and the DTensor by a plain parameter;
placements then decide what becomes of the shard, as for every tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from sptransform.diagnostics.errors import UsageError, describe
from sptransform.parameters.parts import full_tensor, part_of
from sptransform.parameters.shared import SharedParameter

_reads_full = False


def keep_parts(
    model: nn.Module, device_mesh: DeviceMesh, dims: Mapping[str, int | None], calls: Callable[..., Any]
) -> None:
    """Make every parameter of ``model`` a DTensor, sharded by all mesh dims along ``dims[name]`` (None: replicated).

    ``calls`` runs torch functions of them, see :class:`SharedParameter`.

    All ranks hold equal parameters, so nothing is sent. Parameters on ``meta`` stay there. The plain parameters become
    unusable: code that still holds one, such as an optimizer, gets an error on using it.

    Raises:
        UsageError: a parameter has a property that a DTensor would lose; the module is left unchanged.
    """
    _check_plain(model)
    replaced = list(model.parameters())
    dim_of = _dims_by_identity(model, dims)
    parts = {id(old): part_of(old, dim_of.get(id(old)), device_mesh) for old in replaced}
    kind = SharedParameter.called_by(calls)
    for part in parts.values():
        part.__class__ = kind
    for module in model.modules():
        names = tuple(name for name, parameter in module._parameters.items() if parameter is not None)
        for name in names:
            module._parameters[name] = parts[id(module._parameters[name])]
        if names:
            module.__class__ = _full_inside(type(module), names)
    for old in replaced:
        old.__class__ = _Replaced


def keep_less(model: nn.Module, dims: Mapping[str, int | None]) -> None:
    """Shard along ``dims`` the parameters that :func:`keep_parts` left replicated; the objects stay the same.

    Raises:
        UsageError: something attached to a parameter would be lost, or prevents sharding.
    """
    dim_of = _dims_by_identity(model, dims)
    for name, parameter in model.named_parameters():
        if (dim := dim_of.get(id(parameter))) is None:
            continue
        obstacle = "a hook on it" if _has_hooks(parameter) else None
        try:
            if obstacle is None:
                part = part_of(parameter, dim, parameter.device_mesh)
                part.__class__ = type(parameter)  # which is swapped too
                torch.utils.swap_tensors(parameter, part)
        except RuntimeError as error:
            obstacle = str(error)
        if obstacle is not None:
            raise UsageError(
                describe(
                    f"parameter {name!r} cannot be cut at the first call any more",
                    found=obstacle,
                    fix="parallelize(..., inputs=...), with inputs of the shapes to come, cuts parameters at once",
                )
            )


@contextmanager
def full_parameters() -> Iterator[None]:
    """Within the block, eager code sees full parameters too, gathered at each access."""
    global _reads_full
    before, _reads_full = _reads_full, True
    try:
        yield
    finally:
        _reads_full = before


def as_written(model: nn.Module) -> None:
    """Restore the original classes of the modules of ``model``, whose parameters are plain tensors again."""
    for module in model.modules():
        if isinstance(module, _WholeInside):
            module.__class__ = module.written_class


class _WholeInside:
    """Base of the classes that replace those of modules with sharded parameters."""

    written_class: type[nn.Module]
    kept: tuple[str, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (self.written_class, self.kept), *state  # by name, pickle would find the original class


@cache
def _full_inside(written: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    namespace: dict[str, Any] = {name: _Kept(name) for name in names}
    namespace |= {name: getattr(written, name) for name in ("__doc__", "__module__", "__qualname__")}
    namespace |= {"written_class": written, "kept": names, "forward": _reading_full(written.forward)}
    return type(written.__name__, (_WholeInside, written), namespace)


def _reading_full(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward``, which sees full parameters where eager code calls the module by itself, outside of the graph."""

    @wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # there each read is a node
            return forward(self, *args, **kwargs)
        with full_parameters():
            return forward(self, *args, **kwargs)

    return run


def _new(written: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    cls = _full_inside(written, names)
    return cls.__new__(cls)


class _Kept:
    """Descriptor that reads a parameter. It has no ``__set__``, so nn.Module does the setting and deleting."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, module: nn.Module | None, owner: Any = None) -> Any:
        if module is None:
            return self
        if self.name not in module._parameters:
            raise AttributeError(self.name)  # nn.Module.__getattr__ then looks further, or raises its own error
        parameter = module._parameters[self.name]
        if isinstance(parameter, DTensor) and (torch.compiler.is_dynamo_compiling() or _reads_full):
            return full_tensor(parameter)
        return parameter


class _Replaced(nn.Parameter):
    """The class of a parameter that the model has replaced by another: torch functions on it raise."""

    def __repr__(self, **kwargs: Any) -> str:
        return "<a parameter that parallelize has replaced>"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise UsageError(
            describe(
                "a parameter is used that is not the model's any more: parallelize has put parts in its place",
                found=getattr(func, "__qualname__", str(func)),
                fix="make optimizers, and lists of parameters, after parallelize; tie a module outside of the model "
                "to its parameter once more: head.weight = embedding.weight, or tie_weights()",
            )
        )


def _dims_by_identity(model: nn.Module, dims: Mapping[str, int | None]) -> dict[int, int]:
    """The dimension of each parameter by ``id``, since a tied parameter has several names."""
    named = model.named_parameters(remove_duplicate=False)
    return {id(parameter): dim for name, parameter in named if (dim := dims.get(name)) is not None}


def _has_hooks(parameter: Tensor) -> bool:
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def _check_plain(model: nn.Module) -> None:
    in_memory: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        found = None
        if type(parameter) is not nn.Parameter:
            found = f"{name!r} is a {'DTensor' if isinstance(parameter, DTensor) else type(parameter).__name__}"
        elif _has_hooks(parameter):
            found = f"{name!r} has a hook"
        elif parameter.data_ptr() != 0 and (other := in_memory.setdefault(parameter.data_ptr(), name)) != name:
            found = f"{name!r} lies where {other!r} does, as another object"
        if found is not None:
            raise UsageError(
                describe(
                    "ranks can keep parts of plain parameters only",
                    found=found,
                    fix="tie parameters as one object; cut them, and register hooks, with or after parallelize",
                )
            )
