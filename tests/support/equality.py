"""One device is the specification: its loss and gradients, and the comparison of a parallel run with them."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from sptransform.testing.equality import Result, worst_error
from tests.support.collective_counts import Collective, CountCollectives
from tests.support.gloo_pool import get_pool
from tests.support.models import IGNORED, LAYERS, Inputs, build


@dataclass(frozen=True)
class ParallelResult(Result):
    """One rank's result, and the collectives that it issued in each direction, in order."""

    forward: list[Collective]
    backward: list[Collective]


@functools.cache
def one_device(name: str, dtype: torch.dtype = torch.float64, layers: int = LAYERS) -> Result:
    """The named model on one device, in eager mode; computed once."""
    model, inputs = build(name, dtype=dtype, layers=layers)
    return run_one_device(model, inputs)


def one_device_without_one_label(name: str, layers: int = LAYERS) -> Result:
    """The same with the last label taken away: the smallest mistake that a comparison must see."""
    model, inputs = build(name, layers=layers)
    labels = inputs["labels"].clone()
    row, position = (labels != IGNORED).nonzero()[-1].tolist()
    labels[row, position] = IGNORED
    return run_one_device(model, inputs | {"labels": labels})


def run_one_device(model: nn.Module, inputs: Inputs) -> Result:
    """The loss and gradients of a forward and backward in this process."""
    loss = _loss(model(**inputs))
    loss.backward()
    return Result(loss.detach().clone(), _grads(model))


def run_parallel(
    rank: int,
    world_size: int,
    name: str,
    strategy: Any,
    backend: str,
    dtype: torch.dtype = torch.float64,
    layers: int = LAYERS,
    **options: Any,
) -> ParallelResult:
    """What a worker does: the named model through `parallelize`, on the same full inputs as one device."""
    import sptransform

    model, inputs = build(name, dtype=dtype, layers=layers)
    model = sptransform.parallelize(model, strategy, backend=backend, **options)
    with CountCollectives() as forward:
        loss = _loss(model(**inputs))
    with CountCollectives() as backward:
        loss.backward()
    return ParallelResult(loss.detach().clone(), _grads(model), forward.collectives, backward.collectives)


@functools.cache
def one_layer_on_ranks(name: str, world_size: int) -> list[ParallelResult]:
    """Every rank's step under Ulysses of the named model; run once for those who compare it and those who count."""
    return get_pool(world_size).run(run_parallel, name, "ulysses", "aot_eager", layers=1, timeout=180)


def assert_equal_to_one_device(reference: Result, got: Result, tolerance: float) -> None:
    """The loss and every gradient agree; the message names the tensor that agrees least."""
    assert got.grads.keys() == reference.grads.keys(), (
        f"missing gradients: {sorted(reference.grads.keys() - got.grads.keys())}; "
        f"unexpected gradients: {sorted(got.grads.keys() - reference.grads.keys())}"
    )
    name, error = worst_error(reference, got)
    where = "" if got.rank is None else f" on rank {got.rank}"
    assert error <= tolerance, f"{name}{where} differs from one device by {error:.2e}, allowed is {tolerance:.0e}"


def _loss(out: Any) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out.loss


def _grads(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients as whole tensors: a sharded parameter's is gathered, a missing one is left out."""
    grads = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is not None:
            whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
            grads[name] = whole.detach().clone()
    return grads
