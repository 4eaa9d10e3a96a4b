"""Imported by the process from which all others are forked: captures and rewrites a small model, so that they need not.

A quarter of the time of a first capture goes into imports and tables that later ones find made.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sptransform.testing.pretended import Asked, on_pretended_ranks


class _Small(nn.Module):
    """What every model has: a product, attention, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).view(1, 8, 3, 2, 4).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.norm(attended.transpose(1, 2).reshape(1, 8, 8)).square().mean()


on_pretended_ranks(_Small(), {"x": torch.randn(1, 8, 8)}, [Asked(2, name) for name in ("ulysses", "ring")])
