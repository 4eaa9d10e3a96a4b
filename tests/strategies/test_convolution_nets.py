"""Nets of convolutions, in which nothing attends: rows of the image are cut, and nothing is gathered."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.support.equality import run_one_device, worst_error
from tests.support.rewritten import Asked, on_pretended_ranks
from tests.support.tiers import tiered


class Block(nn.Module):
    """A depthwise convolution that takes every second row, in a residual beside a pool that does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, stride=2, padding=2, dilation=2, groups=width)
        self.norm = nn.BatchNorm2d(width)
        self.pointwise = nn.Conv2d(width, width, 1, bias=False)
        self.act = nn.ReLU6(inplace=True)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, 2, 1), nn.Hardswish(), nn.Conv2d(2, width, 1), nn.Hardsigmoid()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.act(self.norm(self.pointwise(self.depthwise(x))))
        pooled = nn.functional.avg_pool2d(x, 3, 2, 1, ceil_mode=False, count_include_pad=False)
        return h * self.gate(h) + pooled


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 5, padding=2)
        self.norm = nn.GroupNorm(2, 4)
        self.blocks = nn.Sequential(Block(4), Block(4))
        self.head = nn.Linear(4, 3)
        self.dropout = nn.Dropout(0.0, inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.max_pool2d(self.norm(self.stem(x)), 3, 2, 1)
        h = self.blocks(h)
        h = nn.functional.interpolate(h, scale_factor=2.0)
        return self.head(self.dropout(h.mean((2, 3)))).square().sum()


@pytest.mark.parametrize(
    ("strategy", "num_ranks", "rows"),
    tiered(
        [(strategy, n, rows) for strategy in ("ulysses", "ring", "megatron") for n in (2, 3) for rows in (25, 32)],
        quick=[("ulysses", 3, 25)],
    ),
)
def test_equals_one_device(strategy: str, num_ranks: int, rows: int) -> None:
    """Of 25 rows every stage has an odd number: 25, 13, 7, 4."""
    torch.manual_seed(0)
    model, asked = Net().double(), Asked(num_ranks, strategy)
    inputs = {"x": torch.randn(2, 3, rows, 9, dtype=torch.float64)}
    ranks = on_pretended_ranks(model, inputs, [asked])[asked]
    assert not ranks.context.result.fallbacks
    text = str(ranks.graphs[0].graph_module.graph)
    assert "all_gather" not in text and "repartition" in text
    expected = run_one_device(model, inputs)
    assert max(worst_error(expected, each)[1] for each in ranks.results()) < 1e-12
