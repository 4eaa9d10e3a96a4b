"""How one tensor is sharded over a mesh: the part of each rank, and the full tensor from the parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as DTensorShard

import sptransform.ops  # noqa: F401 - registers the gather
from sptransform.diagnostics.errors import UsageError, describe
from sptransform.graph.notes import Stored
from sptransform.sharding.partition import Partition
from sptransform.sharding.placement import Shard
from sptransform.sharding.sizes import Size


def first_dims(model: nn.Module, num_ranks: int) -> dict[str, int | None]:
    """:func:`first_dim` of every parameter, by name."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: first_dim(parameter.shape, num_ranks) for name, parameter in named}


def first_dim(shape: Sequence[Size], num_ranks: int) -> int | None:
    """The first dimension, if it has at least one index per rank; else None."""
    return 0 if shape and shape[0] >= num_ranks else None


@torch.compiler.allow_in_graph
def full_tensor(x: DTensor) -> Tensor:
    """The full tensor of a parameter or input. Its gradient is full on every rank, and each rank keeps its part."""
    if not _is_known(x):
        raise _unread(x)
    shards, _ = _cuts(x.shape, x.placements, x.device_mesh)
    part = x.to_local()
    for index, shard in reversed(shards):
        part = torch.ops.sptransform.all_gather(part, shard.spec, x.device_mesh.get_group(index).group_name, True)
    return part


def _cuts(
    full_shape: Sequence[int], placements: Sequence[Any], mesh: DeviceMesh
) -> tuple[list[tuple[int, Shard]], list[int]]:
    """(mesh dim, how it shards what earlier mesh dims leave) of each shard, and the shape of this rank's part."""
    shape = list(full_shape)
    shards = []
    for index, placement in enumerate(placements):
        if isinstance(placement, DTensorShard):
            shard = _shard(placement.dim, shape[placement.dim], mesh.size(index))
            shards.append((index, shard))
            shape[placement.dim] = shard.partition.local_size(mesh.get_local_rank(index))
    return shards, shape


def stored_in(x: DTensor) -> tuple[Stored, ...]:
    """How a tensor is sharded, for each mesh dim that shards it.

    Raises:
        UsageError: the parts are not those of ``torch.chunk`` over ranks in ascending order.
    """
    # a group is always sorted, so with ranks in another order its ranks are not the coordinates in the mesh
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


def _shard(dim: int, size: int, num_ranks: int) -> Shard:
    return Shard(dim, Partition.contiguous(size, num_ranks))


def part_of(parameter: nn.Parameter, dim: int | None, device_mesh: DeviceMesh) -> nn.Parameter:
    """This rank's part of a parameter, and of its gradient."""
    part = nn.Parameter(_cut(parameter, dim, device_mesh), requires_grad=parameter.requires_grad)
    part.__dict__.update(parameter.__dict__)  # settings that optimizers read from a parameter
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
