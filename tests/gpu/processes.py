"""Two gloo processes that share the device: Inductor compiles for it, and replicas are compared there.

NCCL refuses two ranks on one GPU; gloo's collectives take its tensors, and copy them through the host.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import sptransform
from sptransform import ReplicaMismatchError
from tests.gpu.figures import Check, Errors
from tests.gpu.strategies import build, one_device
from tests.support.equality import Result, worst_error
from tests.support.gloo_pool import get_pool

RANKS = 2
TIMEOUT = 240.0
# errors beside one device, which runs eagerly: Inductor rounds 16 bits less often
BOUNDS = {torch.float64: 1e-6, torch.bfloat16: 0.1}
# no reduce-scatter: gloo has none for tensors on a GPU, and ends the process
RUNS = (
    ("padded", "ulysses", torch.float64),
    ("packed documents", "ring", torch.bfloat16),
    ("padded", "usp", torch.float64),
)


def checks(device: str) -> list[Check]:
    compiled = [
        Check("processes", f"Inductor, {strategy}, {name}, {str(dtype).removeprefix('torch.')}",
              partial(_compiled, name, strategy, dtype, device))
        for name, strategy, dtype in RUNS
    ]  # fmt: skip
    return [*compiled, Check("processes", "replicas", partial(_replicas, device))]


def _mesh(device: str) -> DeviceMesh:
    if device == "cuda":
        torch.cuda.set_device(0)
    return init_device_mesh(device, (RANKS,), mesh_dim_names=("sp",))


def _compiled(name: str, strategy: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    errors = Errors(BOUNDS[dtype])
    found = get_pool(RANKS, spawn=device == "cuda").run(_step, name, strategy, dtype, device, timeout=TIMEOUT)
    for rank, error in enumerate(found):
        errors.add(f"rank {rank}", lambda error=error, rank=rank: {f"on rank {rank}": error})
    return errors.figures()


def _step(rank: int, world_size: int, name: str, strategy: str, dtype: torch.dtype, device: str) -> float:
    """Two steps, since the second runs what the first compiled; the error of the second."""
    mesh = _mesh(device)
    model, inputs = build(name, dtype, device)
    expected = one_device(model, inputs)
    model = sptransform.parallelize(model, strategy, mesh=mesh, outputs="loss")
    for _ in range(2):
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
    grads = {key: _whole(x.grad) for key, x in model.named_parameters() if x.grad is not None}
    return worst_error(expected, Result(loss.detach(), grads))[1]


def _whole(x: Any) -> torch.Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def _replicas(device: str) -> dict[str, Any]:
    wrong = [
        text
        for texts in get_pool(RANKS, spawn=device == "cuda").run(_mistakes, device, timeout=TIMEOUT)
        for text in texts
    ]
    return {"cases": 2, "wrong": wrong}


def _mistakes(rank: int, world_size: int, device: str) -> list[str]:
    """What is not noticed of other weights and other batches. On a GPU a batch is judged a call later."""
    mesh, wrong = _mesh(device), []
    is_odd = rank == world_size - 1
    model, inputs = build("padded", torch.float64, device)
    with torch.no_grad():
        next(model.parameters()).add_(1e-3 * is_odd)
    parallel = sptransform.parallelize(model, "ulysses", mesh=mesh, outputs="loss", backend="eager")
    if not _is_refused(lambda: parallel(**inputs)):
        wrong.append(f"rank {rank}: other weights were not noticed")
    sptransform.broadcast_parameters(model, mesh)
    parallel(**inputs)
    other = inputs | {"labels": inputs["labels"].flip(1)} if is_odd else inputs
    if not (_is_refused(lambda: parallel(**other)) or _is_refused(lambda: parallel(**inputs))):
        wrong.append(f"rank {rank}: another batch was not noticed within two calls")
    return wrong


def _is_refused(call: Any) -> bool:
    try:
        call()
    except ReplicaMismatchError:
        return True
    return False
