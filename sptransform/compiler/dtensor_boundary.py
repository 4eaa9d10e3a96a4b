"""DTensors on the way into and out of a compiled graph, which computes on plain local tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as DTensorShard

from sptransform.engine.context import Context
from sptransform.graph import dataflow
from sptransform.sharding.placement import Placement, Shard


def local_input(x: Any, gm: fx.GraphModule) -> Any:
    """The example input for the inner backend: for a DTensor, a fake of its local tensor."""
    if not isinstance(x, DTensor):
        return x
    mode = dataflow.fake_mode(gm.graph)
    return mode.from_tensor(x.detach().to_local(), static_shapes=True).requires_grad_(x.requires_grad)


def of_local_parts(compiled: Callable[..., Any], inputs: Sequence[Any]) -> Callable[..., Any]:
    """``compiled``, for calls with DTensors: ``to_local`` runs outside of it, so that gradients are DTensors too."""
    places = [index for index, x in enumerate(inputs) if isinstance(x, DTensor)]
    if not places:
        return compiled

    def run(*args: Any) -> Any:
        local = list(args)
        for index in places:
            local[index] = args[index].to_local()
        return compiled(*local)

    return run


def with_dtensors(compiled: Callable[..., Any], context: Context) -> Callable[..., Any]:
    """Return sharded outputs as DTensors: only the user's ``full_tensor()`` gathers them."""

    meshes = [part.mesh for part in context.result.mesh_dims]
    device_mesh = meshes[0].device_mesh if len(meshes) == 1 else context.mesh.grid(*(mesh.size for mesh in meshes))

    def wrap(x: Any, *placements: Placement | None) -> Any:
        if not any(isinstance(placement, Shard) for placement in placements):
            return x
        shape = list(x.shape)
        for placement, mesh in reversed(list(zip(placements, meshes, strict=True))):
            if isinstance(placement, Shard):
                # an even partition may leave its length open, so this call's local size gives it
                whole = shape[placement.dim] * mesh.size if placement.partition.is_even else placement.dim_size
                shape[placement.dim] = whole
        stride = torch.empty(shape, device="meta").stride()
        dims = [DTensorShard(p.dim) if isinstance(p, Shard) else Replicate() for p in placements]
        return DTensor.from_local(x, device_mesh, dims, run_check=False, shape=torch.Size(shape), stride=stride)

    def run(*args: Any) -> Any:
        outputs = compiled(*args)
        return tuple(map(wrap, outputs, *(part.result.output_placements for part in context.result.mesh_dims)))

    return run
