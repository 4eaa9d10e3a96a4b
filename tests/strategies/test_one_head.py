"""Attention of one head, under strategies that share heads: its queries are shared instead."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from sptransform import UsageError
from tests.support.equality import run_one_device, worst_error
from tests.support.rewritten import Asked, on_pretended_ranks

pytestmark = pytest.mark.slow


class Heads(nn.Module):
    """An attention of one head, then one of two."""

    def __init__(self, *, is_causal: bool) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(4, 12), nn.Linear(4, 4)
        self.is_causal = is_causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for num_heads in (1, 2):
            q, k, v = (t.unflatten(2, (num_heads, -1)).transpose(1, 2) for t in self.into(x).chunk(3, 2))
            found = scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
            x = x + self.out(found.transpose(1, 2).flatten(2))
        return x.square().sum()


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("strategy", ["ulysses", "megatron"])
def test_equals_one_device(strategy: str, num_ranks: int, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, inputs = Heads(is_causal=False).double(), {"x": torch.randn(2, 7, 4, dtype=torch.float64)}
    asked = Asked(num_ranks, strategy)
    with caplog.at_level(logging.WARNING, "sptransform"):
        ranks = on_pretended_ranks(model, inputs, [asked])[asked]
    assert "one head" in caplog.text
    expected = run_one_device(model, inputs)
    assert max(worst_error(expected, each)[1] for each in ranks.results()) < 1e-12


@pytest.mark.parametrize("strategy", ["ulysses", "megatron"])
def test_causal_is_refused(strategy: str) -> None:
    """Its queries cannot be cut where nothing reads masks by position."""
    with pytest.raises(UsageError, match="nothing to split"):
        on_pretended_ranks(Heads(is_causal=True), {"x": torch.randn(2, 7, 4)}, [Asked(2, strategy)])
