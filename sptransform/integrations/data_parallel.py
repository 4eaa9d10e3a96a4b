"""Data parallelism over sequence parallelism: which dims of a mesh are which, and gradients that are averaged.

``dp_replicate``: every rank keeps the parameters that it would have anyway; DDP averages their gradients.
``dp_shard``: FSDP2 shards parameters, gradients and optimizer states; with ``dp_replicate``, hybrid sharding.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from sptransform.diagnostics.errors import UsageError, describe

REPLICATE, SHARD = "dp_replicate", "dp_shard"


@dataclass(frozen=True)
class Layout:
    """What the dims of a mesh of all ranks are for.

    Attributes:
        data: the dims along which ranks have different batches; None if there are none.
        sequences: the others, along which ranks share each sequence.
    """

    data: DeviceMesh | None
    sequences: DeviceMesh

    @property
    def num_data(self) -> int:
        return 1 if self.data is None else self.data.size()


def layout_of(mesh: DeviceMesh) -> Layout:
    """Read the names of a mesh's dims.

    Raises:
        UsageError: it is not of all ranks in order, data parallel dims first.
    """
    names = mesh.mesh_dim_names or ()
    data = tuple(name for name in names if name in (REPLICATE, SHARD))
    ranks = mesh.mesh.flatten().tolist()
    if ranks != list(range(dist.get_world_size())) or names[: len(data)] != data:
        raise UsageError(
            describe(
                "trainers give consecutive ranks the same batches, so a mesh is of all ranks in order, its data "
                "parallel dims first",
                found=f"dims {names}, ranks {ranks} of {dist.get_world_size()}",
                fix=f"init_device_mesh(device, (2, 4), mesh_dim_names=({SHARD!r}, 'sp'))",
            )
        )
    if not data:
        return Layout(None, mesh)
    sequences = names[len(data) :]
    if not sequences:
        raise UsageError(
            describe("no dim is left for the sequence", found=f"dims {names}", fix=f"({SHARD!r}, 'sp') for example")
        )
    return Layout(mesh[data], mesh[sequences])


def check_cut(layout: Layout, keeps_parts: bool, is_cut_at_once: bool) -> None:
    """Raise UsageError if data parallelism does not go with parameters of which ranks keep parts."""
    if layout.data is None or not keeps_parts:
        return
    if SHARD not in layout.data.mesh_dim_names:
        raise UsageError(
            describe(
                "DDP reduces plain parameters, and ranks keep parts of this model's",
                found=f"a mesh dim {REPLICATE!r}",
                fix=f"name it {SHARD!r}: FSDP2 takes them",
            )
        )
    if not is_cut_at_once:
        raise UsageError(
            describe(
                "FSDP2 shards what the strategy has cut already, and this one cuts at the first call",
                found=f"a mesh dim {SHARD!r}, and no inputs",
                fix="prepare(.., inputs=..), with inputs of the shapes to come, cuts parameters at once",
            )
        )


def share_data(model: nn.Module, layout: Layout) -> Callable[[], AbstractContextManager[Any]] | None:
    """Make a parallelized ``model`` average its gradients over ``layout.data``.

    Returns:
        a context in which they are not averaged yet; None if they always are.
    """
    data = layout.data
    if SHARD in data.mesh_dim_names:
        fully_shard(model, mesh=data)
        _call(model, _resharding(model, model._compiled_call_impl))
        return None
    # it may be that a batch leaves a part of a model out
    ddp = nn.parallel.DistributedDataParallel(
        _Called(model, model._compiled_call_impl), process_group=data.get_group(), find_unused_parameters=True
    )
    _call(model, ddp.__call__)  # not as a submodule, or its parameters had further names
    return ddp.no_sync


class _Called(nn.Module):
    """The module that DDP wraps: it has the parameters of ``model``, and its call is ``call``."""

    def __init__(self, model: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


def _resharding(model: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
    """``call``; without gradients no backward frees the whole parameters, which an optimizer would then find."""

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        finally:
            if not torch.is_grad_enabled() and isinstance(model, FSDPModule):
                model.reshard()

    return run


def _call(model: nn.Module, call: Callable[..., Any]) -> None:
    # nn.Module calls this in the place of its forward; an outer torch.compile must not trace into it
    model._compiled_call_impl = torch.compiler.disable(call)
