"""Every rank takes the first one's parameters and buffers."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from sptransform.diagnostics.errors import UsageError, describe


@torch.no_grad()
def broadcast_parameters(model: nn.Module, mesh: DeviceMesh | None = None) -> None:
    """Copy parameters and buffers of the first rank of ``mesh`` to all its ranks, in place.

    Call it on every rank, before or after an optimizer is made. Tied parameters are sent once.

    Args:
        model: the same module on every rank.
        mesh: the ranks, of any number of dims; default: all ranks of the default process group.

    Raises:
        UsageError: ranks keep parts of a parameter, which cannot be made equal any more, or a tensor is on ``meta``.
    """
    tensors = {id(x): (name, x) for named in (model.named_parameters, model.named_buffers) for name, x in named()}
    local = [_local(name, x) for name, x in tensors.values()]
    sent = [x.contiguous() for x in local]
    for group in [None] if mesh is None else mesh.get_all_groups():
        # over one mesh dim after the other: in the end all ranks have what the first rank of all had
        works = [dist.broadcast(x, group=group, group_src=0, async_op=True) for x in sent]
        for work in works:
            work.wait()
    for x, new in zip(local, sent, strict=True):
        if new is not x:
            x.copy_(new)


def _local(name: str, x: Tensor) -> Tensor:
    if isinstance(x, DTensor):
        if not all(isinstance(placement, Replicate) for placement in x.placements):
            raise UsageError(
                describe(
                    f"each rank keeps a part of {name!r}",
                    found=f"placements {x.placements}",
                    fix="broadcast_parameters before parallelize",
                )
            )
        x = x.to_local()
    if x.device.type == "meta":
        raise UsageError(
            describe(f"{name!r} has no values yet", found="it is on meta", fix="model.to_empty(..), and load them")
        )
    return x.detach()
