"""Transformer layers on `meta`, of open sizes, and their steps under each strategy."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sptransform.compiler.rewrite import rewrite
from sptransform.cost.read import step_of
from sptransform.cost.records import Step
from sptransform.strategies.names import StrategyLike


class Layer(nn.Module):
    """Causal attention of ``heads`` over ``key_heads``, and an MLP if ``hidden`` is not 0."""

    def __init__(self, width: int, heads: int, key_heads: int, dim: int, hidden: int = 0) -> None:
        super().__init__()
        self.heads, self.key_heads, self.dim = heads, key_heads, dim
        self.query, self.key, self.value = (
            nn.Linear(width, n * dim, bias=False) for n in (heads, key_heads, key_heads)
        )
        self.out = nn.Linear(heads * dim, width, bias=False)
        self.mlp = nn.ModuleList(
            [nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)] * bool(hidden)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (n, self.dim)).transpose(1, 2)
            for f, n in ((self.query, self.heads), (self.key, self.key_heads), (self.value, self.key_heads))
        )
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        if len(self.mlp):
            x = x + self.mlp[1](functional.gelu(self.mlp[0](x)))
        return x


class Layers(nn.Module):
    """Equal layers; the loss is a sum over all tokens."""

    def __init__(self, depth: int = 1, **sizes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(**sizes) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.float().pow(2).sum()


@cache
def layer_step(
    strategy: StrategyLike,
    world_size: int | tuple[int, ...],
    batch: int,
    tokens: int,
    sizes: tuple[tuple[str, int], ...],
) -> Step:
    """The step of rank 0. Gradients of parameters are not summed over the ranks."""
    model, inputs = meta_layer(batch, tokens, dict(sizes))
    found = rewrite(model, strategy, inputs, world_size=world_size, outputs="loss", grad_sync=False)
    return step_of(found)


def meta_layer(batch: int, tokens: int, sizes: Mapping[str, int]) -> tuple[nn.Module, tuple[Any, ...]]:
    with torch.device("meta"):
        model = Layers(**sizes).bfloat16()
        x = torch.empty(batch, tokens, sizes["width"], dtype=torch.bfloat16)
    return model, (x,)
