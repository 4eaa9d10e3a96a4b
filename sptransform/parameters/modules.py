"""Parameters of which each rank keeps its part: DTensors to optimizers and checkpoints, whole tensors to the model.

All of a model's parameters are DTensors then, since optimizers and gradient clipping take those or plain tensors, not
both. A module that owns some gets a class of the same name, which hands its forward whole tensors. Under Dynamo that is
one node, :func:`whole`; capture takes it and the part for the plain parameter, and what becomes of the part is decided
by placements, as for every tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from sptransform.diagnostics.errors import UsageError, describe
from sptransform.parameters.parts import part_of, whole

_is_whole = False


def keep_parts(model: nn.Module, device_mesh: DeviceMesh, dims: Mapping[str, int | None]) -> None:
    """Make every parameter of ``model`` a DTensor, cut along the dimension ``dims`` has for its name by all mesh dims.

    All ranks hold equal parameters, so nothing is sent. Parameters on ``meta`` stay there. The plain ones are of no use
    any more: whoever still holds one, an optimizer say, gets an error on using it.

    Raises:
        UsageError: a parameter has what a DTensor in its place would lack; the module is left as it was.
    """
    _check_plain(model)
    replaced = list(model.parameters())
    dim_of = _dims_by_identity(model, dims)
    parts = {id(old): part_of(old, dim_of.get(id(old)), device_mesh) for old in replaced}
    for module in model.modules():
        names = tuple(name for name, parameter in module._parameters.items() if parameter is not None)
        for name in names:
            module._parameters[name] = parts[id(module._parameters[name])]
        if names:
            module.__class__ = _whole_inside(type(module), names)
    for old in replaced:
        old.__class__ = _Replaced


def keep_less(model: nn.Module, dims: Mapping[str, int | None]) -> None:
    """Cut parameters that :func:`keep_parts` left whole along ``dims``; they stay the objects they are.

    Raises:
        UsageError: something is attached to a parameter that would be lost, or hinders it.
    """
    dim_of = _dims_by_identity(model, dims)
    for name, parameter in model.named_parameters():
        if (dim := dim_of.get(id(parameter))) is None:
            continue
        obstacle = "a hook on it" if _has_hooks(parameter) else None
        try:
            if obstacle is None:
                torch.utils.swap_tensors(parameter, part_of(parameter, dim, parameter.device_mesh))
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
def whole_parameters() -> Iterator[None]:
    """Within the block parameters are whole in eager code too, gathered at each look."""
    global _is_whole
    before, _is_whole = _is_whole, True
    try:
        yield
    finally:
        _is_whole = before


def as_written(model: nn.Module) -> None:
    """Give the modules of ``model``, whose parameters are plain tensors again, the classes they had."""
    for module in model.modules():
        if isinstance(module, _WholeInside):
            module.__class__ = module.written_class


class _WholeInside:
    """Base of the classes that stand in place of those of modules with parameters kept in parts."""

    written_class: type[nn.Module]
    kept: tuple[str, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (self.written_class, self.kept), *state  # pickle looks classes up by name, and finds the other


@cache
def _whole_inside(written: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    namespace: dict[str, Any] = {name: _Kept(name) for name in names}
    namespace |= {name: getattr(written, name) for name in ("__doc__", "__module__", "__qualname__")}
    namespace |= {"written_class": written, "kept": names}
    return type(written.__name__, (_WholeInside, written), namespace)


def _new(written: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    cls = _whole_inside(written, names)
    return cls.__new__(cls)


class _Kept:
    """A parameter as an attribute. Having no ``__set__``, it leaves setting and deleting to nn.Module."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, module: nn.Module | None, owner: Any = None) -> Any:
        if module is None:
            return self
        if self.name not in module._parameters:
            raise AttributeError(self.name)  # nn.Module then looks elsewhere, and says it in its own words
        parameter = module._parameters[self.name]
        if isinstance(parameter, DTensor) and (torch.compiler.is_dynamo_compiling() or _is_whole):
            return whole(parameter)
        return parameter


class _Replaced(nn.Parameter):
    """What became of a parameter in whose place the model has another."""

    def __repr__(self, **kwargs: Any) -> str:
        return "<a parameter that parallelize has replaced>"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise UsageError(
            describe(
                "a parameter is used that is not the model's any more: parallelize has put parts in its place",
                found=getattr(func, "__qualname__", str(func)),
                fix="make optimizers, and lists of parameters, after parallelize",
            )
        )


def _dims_by_identity(model: nn.Module, dims: Mapping[str, int | None]) -> dict[int, int]:
    """The dimension of each parameter by ``id``; a tied one has several names."""
    named = model.named_parameters(remove_duplicate=False)
    return {id(parameter): dim for name, parameter in named if (dim := dims.get(name)) is not None}


def _has_hooks(parameter: Tensor) -> bool:
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def _check_plain(model: nn.Module) -> None:
    in_memory: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        found = None
        if type(parameter) is not nn.Parameter:
            found = f"{name!r} is a {type(parameter).__name__}"
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
