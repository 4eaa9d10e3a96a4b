"""Graphs whose inputs and tables come in another order on each rank are one program."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sptransform
from sptransform.agreement.program import captured_lines
from tests.support.gloo_pool import get_pool
from tests.support.graphs import captured

KINDS = ("full", "sliding", "chunked")


class Tables(nn.Module):
    """Rotary tables of several kinds, made in the order of a set of strings, as Gemma 4 makes them."""

    def __init__(self, order: Sequence[str], swapped: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(16, 48, dtype=torch.float64)
        self.order, self.swapped = order, swapped
        for kind in order:
            self.register_buffer(kind, torch.arange(1.0, 5.0, dtype=torch.float64) * len(kind))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[1])[:, None]
        tables = {kind: (positions / getattr(self, kind)).sin() for kind in self.order}
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4)
        first, last = ("full", "sliding") if self.swapped else ("sliding", "full")
        q, k = q * tables[first], k * tables[last] + tables["chunked"]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).sum()


def an_input() -> torch.Tensor:
    return torch.randn(2, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def lines(order: Sequence[str], swapped: bool = False) -> list[str]:
    gm, _ = captured(Tables(order, swapped), an_input())
    return [line.text for line in captured_lines(gm.graph)]


@pytest.mark.parametrize("order", [KINDS[::-1], ("sliding", "chunked", "full")])
def test_another_order_is_the_same_program(order: Sequence[str]) -> None:
    assert lines(order) == lines(KINDS)


def test_another_table_is_another_program() -> None:
    assert lines(KINDS, swapped=True) != lines(KINDS)


def in_an_order_of_its_own(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    model = sptransform.parallelize(Tables(KINDS[rank:] + KINDS[:rank]), "ring", backend="aot_eager")
    loss = model(an_input())
    loss.backward()
    return loss.detach(), model.qkv.weight.grad


@pytest.mark.timeout(120)
def test_ranks_with_orders_of_their_own() -> None:
    model = Tables(KINDS)
    loss = model(an_input())
    loss.backward()
    for found, grad in get_pool(2).run(in_an_order_of_its_own):
        torch.testing.assert_close(found, loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(grad, model.qkv.weight.grad, rtol=1e-12, atol=1e-12)
