"""One attention between projections, rewritten for ranks: its kernels, messages and merges, as a step."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import sptransform as sp
from sptransform.cost.hardware import HardwareLike
from sptransform.cost.read import step_of
from sptransform.cost.records import Step, Work
from sptransform.cost.simulate import simulate

WIDTH = 64  # of what the projections read: they are left out of the step, and cost nothing


class Attention(nn.Module):
    """Projections, attention and a projection; [B, S, WIDTH] -> [B, S, WIDTH]."""

    def __init__(self, heads: int, key_heads: int, dim: int, causal: bool) -> None:
        super().__init__()
        self.dim, self.causal, self.grouped = dim, causal, heads != key_heads
        self.query = nn.Linear(WIDTH, heads * dim, bias=False)
        self.key = nn.Linear(WIDTH, key_heads * dim, bias=False)
        self.value = nn.Linear(WIDTH, key_heads * dim, bias=False)
        self.out = nn.Linear(heads * dim, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        projected = (linear(x).view(batch, length, -1, self.dim) for linear in (self.query, self.key, self.value))
        q, k, v = (x.transpose(1, 2) for x in projected)
        y = scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=self.grouped)
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))


@cache
def attention_step(
    strategy: sp.Strategy,
    world_size: int,
    rank: int,
    sizes: tuple[int, int, int, int, int],
    causal: bool = True,
    peers_merge: bool = False,
) -> Step:
    """Attention of (batch, heads, key heads, length, dim) in bfloat16, without what surrounds it.

    ``peers_merge``: blocks are merged as most published rings do it, see :func:`merged_as_peers`.
    """
    batch, heads, key_heads, length, dim = sizes
    with torch.device("meta"):
        model = Attention(heads, key_heads, dim, causal).to(torch.bfloat16)
        x = torch.empty(batch, length, WIDTH, dtype=torch.bfloat16)
    step = step_of(sp.rewrite(model, strategy, (x,), world_size=world_size, rank=rank))
    works = [work for work in step.works if work.kind != "matmul" and not _restores_order(work)]
    return replace(step, works=tuple(merged_as_peers(works) if peers_merge else works))


def _restores_order(work: Work) -> bool:
    """Of what the model returns, which it does once."""
    return work.ring is not None and work.ring[0].startswith("repartition")


def merged_as_peers(works: list[Work]) -> list[Work]:
    """Rings in which blocks are merged as in zhuzilin/ring-flash-attention, ring_flash_attn/utils.py, and its copies.

    ``_update_out_and_lse`` casts the block, and computes out - weight * (out - block) in float32: of each element it
    reads and writes 6 bytes, then 12, 8 and 12. Its launches, and what it does to the lse, are left out.
    """
    found: list[Work] = []
    elements = 0
    for work in works:
        if work.kind == "attention":
            sizes = work.sizes
            elements = sizes["batch"] * sizes["heads"] * sizes["queries"] * sizes["value_dim"]
        if work.op == "sptransform.merge_block":
            work = replace(work, traffic=(6 + 12 + 8 + 12) * elements)
        found.append(work)
    return found


def attention_seconds_of(
    strategy: sp.Strategy,
    world_size: int,
    sizes: tuple[int, int, int, int, int],
    hardware: HardwareLike,
    *,
    causal: bool = True,
    passes: tuple[str, ...] = ("forward",),
    peers_merge: bool = False,
    ranks: tuple[int, ...] | None = None,
) -> float:
    """What the slowest rank takes; of zigzag rings that is the first or the last, which merge least and most rows."""
    taken = []
    for rank in ranks or (0, world_size - 1):
        step = attention_step(strategy, world_size, rank, sizes, causal, peers_merge)
        works = [work for direction in passes for work in step.works if work.direction == direction]
        taken.append(simulate(replace(step, works=tuple(works)), hardware).seconds)
    return max(taken)
