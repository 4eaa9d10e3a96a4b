"""The ranks a sequence is split over: their number, this rank, and the group's name. Needs no process group.

A two-dim mesh is handled one dim after the other: :meth:`Mesh.split` gives a mesh for each dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sptransform.diagnostics.errors import UsageError, describe

PRETENDED_GROUP = "sptransform"
#: most ranks that are pretended: who sends how much to whom is a table of ranks by ranks, 1.5 GiB for 2,048 of them
MOST_PRETENDED = 4096


@dataclass(frozen=True)
class Mesh:
    """The ranks of one mesh dim.

    Attributes:
        size: number of ranks.
        rank: this process's rank among them.
        group: name of the process group, as graphs hold it.
        device_mesh: the torch mesh behind it; None for a pretended mesh.
        shape: number of ranks per dim; several dims only before :meth:`split`.
    """

    size: int
    rank: int
    group: str
    device_mesh: DeviceMesh | None = None
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", self.shape or (self.size,))

    @staticmethod
    def pretended(world_size: int | tuple[int, ...], rank: int = 0) -> Mesh:
        """A mesh without processes, to make and inspect graphs. A tuple ``world_size`` gives the ranks per dim.

        Raises:
            UsageError: an impossible rank, or more ranks than :data:`MOST_PRETENDED`.
        """
        shape = world_size if isinstance(world_size, tuple) else (world_size,)
        size = prod(shape)
        if min(shape) < 1 or not 0 <= rank < size:
            fix = f"a rank from 0 to {size - 1}" if min(shape) > 0 else "world_size=1 or more"
            raise UsageError(describe("no such rank", found=f"rank {rank} of world_size {world_size}", fix=fix))
        if size > MOST_PRETENDED:
            what = "too many ranks to pretend in one process"
            fix = f"{MOST_PRETENDED} ranks or fewer; ranks of data parallelism, which no strategy uses, are not counted"
            raise UsageError(describe(what, found=f"world_size={world_size}", fix=fix))
        return Mesh(size, rank, PRETENDED_GROUP, shape=shape)

    @staticmethod
    def of(device_mesh: DeviceMesh) -> Mesh:
        """The ranks of a DeviceMesh of one or two dims; for two, makes a process group of all its ranks.

        Raises:
            UsageError: this rank is not in the mesh.
        """
        if device_mesh.get_coordinate() is None:
            raise UsageError(
                describe(
                    "this rank is not in the mesh",
                    found=f"rank {dist.get_rank()}, a mesh of ranks {device_mesh.mesh.flatten().tolist()}",
                    fix="call parallelize on the ranks of the mesh only, each with the mesh it is in",
                )
            )
        group = device_mesh.get_group() if device_mesh.ndim == 1 else _group_of_all(device_mesh)
        return Mesh(group.size(), group.rank(), group.group_name, device_mesh, tuple(device_mesh.shape))

    def split(self, outer: int, inner: int) -> tuple[Mesh, Mesh]:
        """View the ranks as ``outer x inner``; return a mesh for each dim. The ranks of ``inner`` are neighbours.

        All ranks must make the first call together, because it may create process groups.
        """
        if self.device_mesh is None:
            return (
                Mesh(outer, self.rank // inner, f"{self.group}_outer"),
                Mesh(inner, self.rank % inner, f"{self.group}_inner"),
            )
        whole = self.grid(outer, inner)
        dims = []
        for dim, size in enumerate((outer, inner)):
            group = whole.get_group(dim)
            # a slice, where possible, lets other libraries find the parent mesh
            names = whole.mesh_dim_names
            part = whole[names[dim]] if names else DeviceMesh.from_group(group, whole.device_type)
            dims.append(Mesh(size, whole.get_local_rank(dim), group.group_name, part))
        return dims[0], dims[1]

    def grid(self, outer: int, inner: int) -> DeviceMesh:
        """The two-dim torch mesh behind :meth:`split`."""
        return self.device_mesh if self.device_mesh.ndim == 2 else _split(self.device_mesh, outer, inner)


# Weak keys: cached groups and meshes go away with the process group they were made from.
_groups: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], dist.ProcessGroup]] = WeakKeyDictionary()
_splits: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, int], DeviceMesh]] = WeakKeyDictionary()


def _group_of(ranks: list[int]) -> dist.ProcessGroup:
    """A group of these global ranks, in this order, made once. Only its members have to call this."""
    if ranks == list(range(dist.get_world_size())):
        return dist.group.WORLD
    known = _groups.setdefault(dist.group.WORLD, {})
    if tuple(ranks) not in known:
        known[tuple(ranks)] = dist.new_group(ranks, use_local_synchronization=True)
    return known[tuple(ranks)]


def _group_of_all(device_mesh: DeviceMesh) -> dist.ProcessGroup:
    ranks = device_mesh.mesh.flatten().tolist()
    if ranks != sorted(ranks):
        raise UsageError(
            describe(
                "the ranks of a mesh of two dims are not in order",
                found=str(device_mesh.mesh.tolist()),
                fix="init_device_mesh(...), or a slice of the mesh it gives",
            )
        )
    return _group_of(ranks)


def _split(device_mesh: DeviceMesh, outer: int, inner: int) -> DeviceMesh:
    """The mesh as a two-dim mesh; made once, because it needs process groups."""
    group = device_mesh.get_group()
    known = _splits.setdefault(group, {})
    if (outer, inner) not in known:
        ranks = device_mesh.mesh.reshape(outer, inner)
        ring, place = (ranks == dist.get_rank()).nonzero()[0].tolist()
        groups = [_group_of(own.tolist()) for own in (ranks[:, place], ranks[ring, :])]
        known[outer, inner] = DeviceMesh.from_group(
            groups, device_mesh.device_type, mesh=ranks, mesh_dim_names=("ring", "ulysses")
        )
    return known[outer, inner]


def device_mesh_of(given: DeviceMesh | None) -> DeviceMesh:
    """The mesh a user passed; by default a mesh of all ranks of the default group.

    Raises:
        UsageError: no process group is initialised, or ``given`` is not a DeviceMesh.
    """
    if given is None:
        if not dist.is_initialized():
            raise UsageError(
                describe(
                    "no process group to split the sequence over",
                    found="torch.distributed is not initialised and no mesh was given",
                    fix="call torch.distributed.init_process_group(...) first, or pass mesh=",
                )
            )
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device_type = accelerator.type if accelerator is not None and dist.get_backend() != "gloo" else "cpu"
        return init_device_mesh(device_type, (dist.get_world_size(),), mesh_dim_names=("sp",))
    if not isinstance(given, DeviceMesh):
        found = type(given).__name__
        raise UsageError(describe("mesh is not a DeviceMesh", found=found, fix="use init_device_mesh"))
    return given
