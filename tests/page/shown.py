"""What tests show on pages: a tiny model of four equal layers, under a few strategies, without processes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product

import torch
from sympy import floor
from torch import nn
from torch.nn import functional

import sptransform
from sptransform import Comparison
from sptransform.cost.formulas import B, Formula, N, S
from sptransform.cost.hardware import hardware_of
from sptransform.cost.time_formulas import StepTimes, parts_of

SEQ_LEN, WIDTH, HEADS, LAYERS = 64, 16, 4, 4


class Layer(nn.Module):
    """Attention and a product, with a residual connection."""

    def __init__(self, heads: int = HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        query, key, value = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return x + self.out(attended.transpose(1, 2).reshape(batch, length, WIDTH))


class Stack(nn.Module):
    """Equal layers and a sum; one line of it has characters that markup must escape."""

    def __init__(self, layers: int = LAYERS, heads: int = HEADS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(heads) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return (x * 2 if "<script>" < "&" else x * 3).sum()  # </script>


def stack(layers: int = LAYERS) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    with torch.device("meta"):
        return Stack(layers), {"x": torch.zeros(1, SEQ_LEN, WIDTH)}


@cache
def comparison() -> Comparison:
    """Three strategies on four ranks, and one that heads block; with formulas that a slider can be checked by."""
    model, inputs = stack()
    found = sptransform.compare(
        model, inputs, world_size=4, hardware="h100-nvlink", strategies=["ulysses", "ring", "megatron"]
    )
    at = tuple({S: s, B: b, N: n} for s, b, n in product((64, 96), (1, 2), (2, 4, 8)))
    holds = "on 2, 4, 8 ranks, for tokens that 32 divides"
    expressions = {
        "forward bytes": 8 * B * S * WIDTH * (N - 1) / N**2 + floor(8 * (N - 1) / N),
        "forward FLOPs": 10**14 * (B * S**2 + S) / N,
    }

    def formulas(name: str) -> dict[str, Formula]:
        return {what: Formula(is_, holds, at, {2: name, 4: name, 8: f"{name} 8"}) for what, is_ in expressions.items()}

    return replace(found, options=tuple(replace(option, formulas=formulas(option.name)) for option in found.options))


@cache
def comparison_with_times() -> Comparison:
    """The same, whose steps on four ranks were counted at other lengths too."""
    found = comparison()
    steps = {option.name: [(SEQ_LEN, option.step)] for option in found.runnable}
    for tokens in (2 * SEQ_LEN, 4 * SEQ_LEN):
        model, _ = stack()
        inputs = {"x": torch.zeros(1, tokens, WIDTH, device="meta")}
        for option in sptransform.compare(model, inputs, world_size=4, strategies=list(steps)).runnable:
            steps[option.name].append((tokens, option.step))

    def times(name: str) -> StepTimes | None:
        if name not in steps or (parts := parts_of(steps[name])) is None:
            return None
        return StepTimes({4: parts}, {4: name}, 1, SEQ_LEN, hardware_of("h100-nvlink"))

    return replace(found, options=tuple(replace(option, times=times(option.name)) for option in found.options))
