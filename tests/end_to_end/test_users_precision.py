"""Mixed precision: ranks are no further from float64 than one device of the same precision is; loss scaling."""

from typing import Any

import pytest
import torch
from torch import nn

import sptransform
from tests.support.equality import Result, assert_equal_to_one_device, one_device, run_one_device
from tests.support.gloo_pool import get_pool
from tests.support.models import FLOAT64, Inputs, build
from tests.support.tiers import tiered

pytestmark = pytest.mark.timeout(240)

# Rounding in another order is no worse on average; this much is chance.
SLACK = 1.2


class AutocastInside(nn.Module):
    """A model that asks for bfloat16 itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(**inputs)


class AutocastAround(AutocastInside):
    """A training loop that does."""

    def forward(self, **inputs: torch.Tensor) -> Any:
        return self.model(**inputs)


def step(name: str, where: str, strategy: Any = None, **options: Any) -> Result:
    """One step in mixed precision, asked for at that place; without a strategy on one device."""
    model, inputs = build(name, dtype=torch.float32, layers=1)
    if where == "parameters":
        model.bfloat16()
    wrapped = (AutocastInside if where == "inside" else AutocastAround)(model)
    if strategy is not None:
        sptransform.parallelize(wrapped, strategy, backend="aot_eager", **options)
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "around"):
        result = run_one_device(wrapped, inputs)
    assert all(p.grad.dtype == p.dtype for p in wrapped.parameters())
    return Result(result.loss, {key.removeprefix("model."): grad for key, grad in result.grads.items()})


def narrow(rank: int, world_size: int, name: str, where: str) -> Result:
    return step(name, where, "ulysses")


def error(result: Result, reference: Result) -> float:
    """Of all gradients together, relative to their size."""
    differences = [(result.grads[key].double() - grad).square().sum() for key, grad in reference.grads.items()]
    sizes = [grad.square().sum() for grad in reference.grads.values()]
    return float((sum(differences) / sum(sizes)).sqrt())


def assert_no_further_than_one_device(results: list[Result], name: str, where: str) -> None:
    reference = one_device(name, layers=1)
    allowed = SLACK * error(step(name, where), reference)
    assert allowed > 1e-3  # it is narrow
    for result in results:
        assert error(result, reference) <= allowed
        assert abs(float(result.loss) - float(reference.loss)) <= 0.02 * float(reference.loss)


PLACES = ("around", "inside", "parameters")
CASES = [(name, where) for name in ("sdpa_transformer", "llama") for where in PLACES]


# llama_nocache: its keys are repeated to all heads in the graph, which is rewritten within the region
@pytest.mark.parametrize(
    ("name", "where"),
    tiered([*CASES, ("llama_nocache", "inside")], quick=[("sdpa_transformer", "around"), ("llama_nocache", "inside")]),
)
def test_no_further_from_float64_than_one_device(name: str, where: str) -> None:
    assert_no_further_than_one_device(get_pool(2).run(narrow, name, where), name, where)


# --- loss scaling ---------------------------------------------------------------------------------------------


def scaled(model: nn.Module, inputs: Inputs, *, overflow: bool) -> tuple[Result, float]:
    """One step of SGD under a gradient scaler: the loss and the parameters after it, and the next scale."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    loss = model(**inputs)
    scaler.scale(loss * (torch.inf if overflow else 1.0)).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    scaler.step(optimizer)
    scaler.update()
    return Result(loss.detach(), {name: p.detach().clone() for name, p in model.named_parameters()}), scaler.get_scale()


def scales(rank: int, world_size: int, overflow: bool) -> tuple[Result, float]:
    model, inputs = build("sdpa_transformer", layers=1)
    return scaled(sptransform.parallelize(model, "ulysses", backend="aot_eager"), inputs, overflow=overflow)


@pytest.mark.parametrize("overflow", tiered([False, True], quick=[False]), ids=["step", "overflow"])
def test_a_gradient_scaler_steps_as_on_one_device(overflow: bool) -> None:
    model, inputs = build("sdpa_transformer", layers=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    reference, scale = scaled(model, inputs, overflow=overflow)
    for result, found_scale in get_pool(2).run(scales, overflow):
        assert_equal_to_one_device(reference, result, FLOAT64)
        assert found_scale == scale
        assert all(torch.equal(before[name], p) for name, p in result.grads.items()) == overflow
