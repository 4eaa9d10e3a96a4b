"""The ranks a sequence is split over: their number, who we are, and the group's name. Needs no process group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sptransform.errors import UsageError, describe

PRETENDED_GROUP = "sptransform"


@dataclass(frozen=True)
class Mesh:
    """One mesh dim.

    Attributes:
        size: number of ranks.
        rank: this process's rank among them.
        group: name of the process group, as graphs hold it.
        device_mesh: the torch mesh behind it; None where ranks are only pretended.
    """

    size: int
    rank: int
    group: str
    device_mesh: DeviceMesh | None = None

    @staticmethod
    def pretended(world_size: int, rank: int = 0) -> Mesh:
        """A mesh without processes, to make and inspect graphs. Raises UsageError for an impossible rank."""
        if world_size < 1 or not 0 <= rank < world_size:
            fix = f"a rank from 0 to {world_size - 1}" if world_size > 0 else "world_size=1 or more"
            raise UsageError(describe("no such rank", found=f"rank {rank} of world_size {world_size}", fix=fix))
        return Mesh(world_size, rank, PRETENDED_GROUP)

    @staticmethod
    def of(device_mesh: DeviceMesh | None) -> Mesh:
        """The mesh behind a one-dimensional DeviceMesh; by default all ranks of the default group.

        Raises:
            UsageError: no process group is initialised, or the mesh has more than one dimension.
        """
        if device_mesh is None:
            if not dist.is_initialized():
                raise UsageError(
                    describe(
                        "no process group to split the sequence over",
                        found="torch.distributed is not initialised and no mesh was given",
                        fix="call torch.distributed.init_process_group(...) first, or pass mesh=",
                    )
                )
            device_mesh = _default_mesh()
        if not isinstance(device_mesh, DeviceMesh):
            raise UsageError(
                describe("mesh is not a DeviceMesh", found=f"{type(device_mesh).__name__}", fix="use init_device_mesh")
            )
        if device_mesh.ndim != 1:
            raise UsageError(
                describe(
                    "a sequence strategy takes one mesh dim",
                    found=f"a mesh of shape {tuple(device_mesh.shape)} with dims {device_mesh.mesh_dim_names}",
                    fix="pass one dim of it, e.g. mesh['sp']",
                )
            )
        if device_mesh.get_coordinate() is None:
            raise UsageError(
                describe(
                    "this rank is not in the mesh",
                    found=f"rank {dist.get_rank()}, a mesh of ranks {device_mesh.mesh.flatten().tolist()}",
                    fix="call parallelize on the ranks of the mesh only, each with the mesh it is in",
                )
            )
        group = device_mesh.get_group()
        return Mesh(device_mesh.size(), device_mesh.get_local_rank(), group.group_name, device_mesh)


def _default_mesh() -> DeviceMesh:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device_type = accelerator.type if accelerator is not None and dist.get_backend() != "gloo" else "cpu"
    return init_device_mesh(device_type, (dist.get_world_size(),), mesh_dim_names=("sp",))
