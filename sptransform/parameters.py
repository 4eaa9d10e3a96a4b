"""Parameters of which each rank keeps a part: DTensors, which a compiled model reads as if they were whole.

What eager code would do, gather a parameter where it is read, is written into the graph that Dynamo captures; capture
takes it out again, and what becomes of the part is decided by placements, as for every tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

import sptransform.ops  # noqa: F401 - registers the gather
from sptransform import placement
from sptransform.errors import UsageError, describe
from sptransform.mesh import Mesh
from sptransform.partition import Partition

_PARTS = "_sptransform_parts"  # of a module: parameter name -> (how it is cut, group), None for a whole one
_is_whole = False


def keep_parts(model: nn.Module, mesh: Mesh, dims: Mapping[str, int | None]) -> None:
    """Make every parameter a DTensor on ``mesh``: this rank's part along ``dims[name]``, the whole where that is None.

    All of them, since optimizers and gradient clipping take DTensors or plain tensors, not both. Nothing is sent: ranks
    hold equal parameters. Names, ties and ``requires_grad`` stay; parameters on ``meta`` stay there, as parts.
    """
    made: dict[int, nn.Parameter] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, DTensor):
                dim = dims.get(f"{path}.{name}" if path else name)
                if id(parameter) not in made:
                    made[id(parameter)] = _part(parameter, mesh, dim)
                module._parameters[name] = made[id(parameter)]
    _read_as_whole(model)


def keep_less(model: nn.Module, mesh: Mesh, dims: Mapping[str, int | None]) -> None:
    """Cut whole DTensor parameters along ``dims`` in place: optimizers hold the same objects as before.

    Raises:
        UsageError: a parameter has a gradient already.
    """
    done: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if dims.get(name) is None or id(parameter) in done:
            continue
        if parameter.grad is not None:
            raise UsageError(
                describe(
                    "a parameter has a gradient before the first call, which decides how it is cut",
                    found=name,
                    fix="pass inputs= to parallelize, or set gradients to None",
                )
            )
        torch.utils.swap_tensors(parameter, _part(parameter.to_local(), mesh, dims[name], parameter.requires_grad))
        done.add(id(parameter))
    _read_as_whole(model)


def _part(whole: Tensor, mesh: Mesh, dim: int | None, requires_grad: bool | None = None) -> nn.Parameter:
    shape, stride = whole.shape, torch.empty(whole.shape, device="meta").stride()
    local, how = whole.detach(), Replicate()
    if dim is not None:
        how = Shard(dim)
        own = Partition.contiguous(shape[dim], mesh.size).owned[mesh.rank]
        lo, hi = own[0] if own else (0, 0)
        local = local.narrow(dim, lo, hi - lo).clone(memory_format=torch.contiguous_format)
    part = DTensor.from_local(local, mesh.device_mesh, [how], run_check=False, shape=shape, stride=stride)
    return nn.Parameter(part, requires_grad=whole.requires_grad if requires_grad is None else requires_grad)


def _read_as_whole(model: nn.Module) -> None:
    for module in model.modules():
        own = {name: _spec(x) for name, x in module._parameters.items() if isinstance(x, DTensor)}
        if own:
            if _PARTS not in module.__dict__:
                module.__class__ = _reading(type(module), tuple(own))
            module.__dict__[_PARTS] = own


def _spec(parameter: DTensor) -> tuple[str, str] | None:
    (how,) = parameter.placements
    if not isinstance(how, Shard):
        return None
    mesh = parameter.device_mesh
    partition = Partition.contiguous(parameter.shape[how.dim], mesh.size())
    return placement.Shard(how.dim, partition).spec, mesh.get_group().group_name


@cache
def _reading(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """``base`` whose parameters read whole while a graph is captured, and are what they are elsewhere."""
    namespace: dict[str, Any] = {name: property(_reader(name)) for name in names}
    namespace |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "_sptransform_base": base}
    return type(base.__name__, (base,), namespace)


def _reader(name: str) -> Any:
    def read(module: nn.Module) -> Any:
        parameter = module._parameters[name]
        if not (torch.compiler.is_dynamo_compiling() or _is_whole) or parameter is None:
            return parameter
        own = module.__dict__[_PARTS][name]
        local = parameter.to_local()
        return local if own is None else torch.ops.sptransform.gather.default(local, *own, True)

    return read


@contextmanager
def whole_parameters() -> Iterator[None]:
    """Within the block parameters read whole in eager code too, for one gather at each reading."""
    global _is_whole
    before, _is_whole = _is_whole, True
    try:
        yield
    finally:
        _is_whole = before


def as_written(model: nn.Module) -> None:
    """Give the modules of ``model``, whose parameters are plain tensors again, the classes they had."""
    for module in model.modules():
        if module.__dict__.pop(_PARTS, None) is not None:
            module.__class__ = type(module)._sptransform_base
