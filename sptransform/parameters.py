"""Parameters of which each rank keeps its part: DTensors to optimizers and checkpoints, whole tensors to the model.

All of a model's parameters are DTensors then, since optimizers and gradient clipping take those or plain tensors, not
both. A module that owns some gets a class of the same name, which hands its forward whole tensors. Under Dynamo that is
one node, :func:`whole`; capture takes it and the part for the plain parameter, and what becomes of the part is decided
by placements, as for every tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as DTensorShard

import sptransform.ops  # noqa: F401 - registers the gather
from sptransform.annotations import Stored
from sptransform.errors import UsageError, describe
from sptransform.partition import Partition
from sptransform.placement import Shard
from sptransform.sizes import Size

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
    parts = {id(old): _part(old, dim_of.get(id(old)), device_mesh) for old in replaced}
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
                torch.utils.swap_tensors(parameter, _part(parameter, dim, parameter.device_mesh))
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


def first_dims(model: nn.Module, num_ranks: int) -> dict[str, int | None]:
    """:func:`first_dim` of every parameter, by name."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: first_dim(parameter.shape, num_ranks) for name, parameter in named}


def first_dim(shape: Sequence[Size], num_ranks: int) -> int | None:
    """The first dimension, where it has an index for each rank."""
    return 0 if shape and shape[0] >= num_ranks else None


@torch.compiler.allow_in_graph
def whole(x: DTensor) -> Tensor:
    """The whole of a parameter or input; its gradient is whole on every rank, and each keeps its part of it."""
    if not _is_known(x):
        raise _unread(x)
    shards, _ = _cuts(x.shape, x.placements, x.device_mesh)
    part = x.to_local()
    for index, shard in reversed(shards):
        part = torch.ops.sptransform.gather(part, shard.spec, x.device_mesh.get_group(index).group_name, True)
    return part


def _cuts(
    whole_shape: Sequence[int], placements: Sequence[Any], mesh: DeviceMesh
) -> tuple[list[tuple[int, Shard]], list[int]]:
    """(mesh dim, what it cuts of what the ones before it leave), and the shape of this rank's part."""
    shape = list(whole_shape)
    shards = []
    for index, placement in enumerate(placements):
        if isinstance(placement, DTensorShard):
            shard = _shard(placement.dim, shape[placement.dim], mesh.size(index))
            shards.append((index, shard))
            shape[placement.dim] = shard.partition.local_size(mesh.get_local_rank(index))
    return shards, shape


@contextmanager
def whole_parameters() -> Iterator[None]:
    """Within the block parameters are whole in eager code too, gathered at each look."""
    global _is_whole
    before, _is_whole = _is_whole, True
    try:
        yield
    finally:
        _is_whole = before


def stored_in(x: DTensor) -> tuple[Stored, ...]:
    """How the ranks of each mesh dim share a tensor, if they do.

    Raises:
        UsageError: otherwise than as chunks of ``torch.chunk``, of ranks in order.
    """
    # of ranks in another order a group is sorted all the same, and its ranks are not the places in the mesh
    in_order = all((x.device_mesh.mesh.diff(dim=index) > 0).all() for index in range(x.device_mesh.ndim))
    if in_order and _is_known(x):
        shards, shape = _cuts(x.shape, x.placements, x.device_mesh)
        if list(x._local_tensor.shape) == shape:
            return tuple(Stored(shard.dim, x.device_mesh.get_group(index).group_name) for index, shard in shards)
    raise _unread(x, f" over ranks {x.device_mesh.mesh.tolist()}")


def _is_known(x: DTensor) -> bool:
    return all(type(placement) in (DTensorShard, Replicate) for placement in x.placements)


def _unread(x: DTensor, where: str = "") -> UsageError:
    here = f"a DTensor of shape {tuple(x.shape)}, here {tuple(x._local_tensor.shape)}, placed {x.placements}"
    return UsageError(
        describe(
            "a tensor is shared in a way that parallelize does not read",
            found=here + where,
            fix="x.redistribute(..) to Shard or Replicate, of ranks in order; parallelize plain parameters",
        )
    )


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


def _shard(dim: int, size: int, num_ranks: int) -> Shard:
    return Shard(dim, Partition.contiguous(size, num_ranks))


def _part(parameter: nn.Parameter, dim: int | None, device_mesh: DeviceMesh) -> nn.Parameter:
    """This rank's part of a parameter, and of its gradient."""
    part = nn.Parameter(_cut(parameter, dim, device_mesh), requires_grad=parameter.requires_grad)
    part.__dict__.update(parameter.__dict__)  # what optimizers are told of a parameter stands there
    if parameter.grad is not None:
        part.grad = _cut(parameter.grad, dim, device_mesh)
    return part


@torch.no_grad()
def _cut(tensor: Tensor, dim: int | None, device_mesh: DeviceMesh) -> DTensor:
    x = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
    placements = [Replicate() if dim is None else DTensorShard(dim)] * device_mesh.ndim
    shards, _ = _cuts(x.shape, placements, device_mesh)
    part = x
    for index, shard in shards:
        owned = shard.partition.owned[device_mesh.get_local_rank(index)]
        start, stop = owned[0] if owned else (0, 0)
        part = part.narrow(shard.dim, start, stop - start)
    if shards:
        part = part.clone(memory_format=torch.contiguous_format)
    stride = torch.empty(x.shape, device="meta").stride() if shards else x.stride()
    return DTensor.from_local(part, device_mesh, placements, run_check=False, shape=x.shape, stride=stride)


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
