"""Models that the tests of the command ask for by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def build(seq_len: int, batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Attention(), (torch.randn(batch, seq_len, 16),)


def of_images(batch: int, seq_len: int = 9) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return build(seq_len, batch)


def number() -> int:
    return 3


def fails() -> Any:
    raise RuntimeError("the weights are elsewhere")


def exits() -> Any:
    raise SystemExit(3)


def misfit(seq_len: int) -> tuple[nn.Module, dict[str, Tensor]]:
    return Attention(), {"y": torch.zeros(1, seq_len, 16)}


def too_wide(seq_len: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Attention(), (torch.zeros(1, seq_len, 17),)


def prints(seq_len: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    print("noise")
    return build(seq_len, 1)


no_function = 3
