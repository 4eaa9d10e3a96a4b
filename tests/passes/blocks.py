"""Tiny models in the forms that the passes look for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

BATCH, LENGTH, HEADS, KEY_HEADS, WIDTH = 2, 8, 4, 2, 2
HIDDEN = HEADS * WIDTH

Repeat = Callable[[torch.Tensor], torch.Tensor]


def by_expand(x: torch.Tensor) -> torch.Tensor:
    """As Hugging Face writes it."""
    batch, heads, length, width = x.shape
    times = HEADS // heads
    return x[:, :, None].expand(batch, heads, times, length, width).reshape(batch, HEADS, length, width)


def by_repeat_interleave(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(HEADS // x.shape[1], dim=1)


def by_tiling(x: torch.Tensor) -> torch.Tensor:
    """Another order: heads 0, 1, 0, 1 instead of 0, 0, 1, 1."""
    return x.repeat(1, HEADS // x.shape[1], 1, 1)


def by_expand_in_tiles(x: torch.Tensor) -> torch.Tensor:
    """The order of `by_tiling` by the ops of `by_expand`."""
    batch, heads, length, width = x.shape
    return x[:, None].expand(batch, HEADS // heads, heads, length, width).reshape(batch, HEADS, length, width)


class Attention(nn.Module):
    """Self-attention and its residual; keys and values are made with fewer heads and repeated."""

    def __init__(self, repeat: Repeat = by_expand, repeat_values: Repeat | None = None) -> None:
        super().__init__()
        self.repeat, self.repeat_values = repeat, repeat_values or repeat
        self.query = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.key = nn.Linear(HIDDEN, KEY_HEADS * WIDTH, bias=False)
        self.value = nn.Linear(HIDDEN, KEY_HEADS * WIDTH, bias=False)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            layer(x).view(BATCH, LENGTH, -1, WIDTH).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        key, value = self.repeat(key), self.repeat_values(value)
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return x + self.out(out.transpose(1, 2).reshape(BATCH, LENGTH, HIDDEN))


def hidden_states() -> torch.Tensor:
    """A random input of `Attention`, that asks for its gradient."""
    torch.manual_seed(0)
    return torch.randn(BATCH, LENGTH, HIDDEN, dtype=torch.float64, requires_grad=True)


def heads(length: int = LENGTH, count: int = HEADS) -> torch.Tensor:
    """Random queries, keys or values."""
    return torch.randn(BATCH, count, length, WIDTH, dtype=torch.float64, requires_grad=True)
