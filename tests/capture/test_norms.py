"""Norms that average over rows: what they compute and what they write, on one device and on ranks that share rows."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import nn

from sptransform.capture.capture import capture
from sptransform.testing.pretended import Runnable
from tests.support.equality import Result, run_one_device, worst_error
from tests.support.graphs import compiled_with, copied
from tests.support.rewritten import Asked, on_pretended_ranks
from tests.support.tiers import tiered


class Normed(nn.Module):
    """A norm that is used twice, so that its running statistics are written twice."""

    def __init__(self, make: Callable[[], nn.Module], ndim: int) -> None:
        super().__init__()
        self.conv = (nn.Conv2d if ndim == 4 else nn.Conv1d)(3, 4, 3, padding=1)
        self.norm = make()
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(2 * self.norm(self.conv(x)))
        return self.head(h.flatten(2).mean(2)).square().sum()


NORMS = {
    "batch": (lambda: nn.BatchNorm2d(4), 4),
    "batch of a sequence": (lambda: nn.BatchNorm1d(4), 3),
    "batch without statistics": (lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False), 4),
    "batch in evaluation": (lambda: nn.BatchNorm2d(4).eval(), 4),
    "instance": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), 4),
    "instance in evaluation": (lambda: nn.InstanceNorm2d(4, track_running_stats=True).eval(), 4),
    "group": (lambda: nn.GroupNorm(2, 4), 4),
    "group of a sequence": (lambda: nn.GroupNorm(4, 4), 3),
}


def normed(name: str) -> tuple[Normed, torch.Tensor]:
    make, ndim = NORMS[name]
    torch.manual_seed(0)
    shape = (2, 3, 7, 5)[:ndim]  # 7 rows: no number of ranks divides them
    return Normed(make, ndim).double(), torch.randn(shape, dtype=torch.float64)


def step(graph: Runnable) -> tuple[Result, dict[str, torch.Tensor]]:
    """The loss, the gradients, and the buffers after it."""
    arguments = copied(graph.inputs)
    loss, *_ = graph.call(*arguments)
    loss.backward()
    names = [node.name for node in graph.graph_module.graph.find_nodes(op="placeholder")]
    tensors = [(name, x) for name, x in zip(names, arguments, strict=True) if isinstance(x, torch.Tensor)]
    grads = {name: x.grad for name, x in zip(graph.names, arguments, strict=True) if name and x.grad is not None}
    return Result(loss.detach(), grads), {name: x for name, x in tensors if "running" in name}


@pytest.mark.parametrize(
    ("name", "strategy", "num_ranks"),
    tiered(
        [(name, strategy, n) for name in NORMS for strategy in ("ulysses", "megatron") for n in (2, 3)],
        quick=[("batch", "ulysses", 3)],
    ),
)
def test_ranks_equal_one_device(name: str, strategy: str, num_ranks: int) -> None:
    model, x = normed(name)
    asked = Asked(num_ranks, strategy)
    ranks = on_pretended_ranks(deepcopy(model), {"x": x}, [asked])[asked]
    expected = run_one_device(model, {"x": x})
    assert not ranks.context.result.fallbacks
    kept = {f"norm_{key}": value for key, value in model.norm.named_buffers() if "running" in key}
    for result, statistics in ranks.run(step):
        _, error = worst_error(expected, result)
        assert error < 1e-12
        assert statistics.keys() == (kept.keys() if model.norm.training or statistics else set())
        for key, value in statistics.items():
            torch.testing.assert_close(value, kept[key], rtol=1e-13, atol=1e-13)


@pytest.mark.slow
def test_sixteen_bits_are_averaged_in_float32() -> None:
    norm = nn.BatchNorm2d(4)
    x = (torch.randn(2, 4, 9, 8) + 100).bfloat16()
    eager, compiled = deepcopy(norm), deepcopy(norm)
    expected = eager(x)
    found = compiled_with(compiled, capture, x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(compiled.running_var, eager.running_var, rtol=1e-4, atol=1e-4)
