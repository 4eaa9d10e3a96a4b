"""A GPT as in the paper on Megatron's sequence parallelism (arXiv 2205.05198), on 8 ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, gelu, scaled_dot_product_attention

import sptransform as sp
from sptransform.cost.folding import LayerRun
from sptransform.cost.read import step_of
from sptransform.cost.records import Step

LENGTH, VOCABULARY, RANKS, KEPT, DROPOUT = 2048, 51200, 8, 3, 0.1


class Block(nn.Module):
    """Attention and an MLP, each with a norm before and dropout after; attention by a fused kernel.

    The kernel keeps what selective recomputation keeps: queries, keys, values and the output.
    """

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.second_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.query, self.key, self.value, self.out = (nn.Linear(hidden, hidden) for _ in range(4))
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        attended = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + dropout(self.out(attended), DROPOUT)
        return x + dropout(self.down(gelu(self.up(self.second_norm(x)))), DROPOUT)


class Model(nn.Module):
    """Embedding, blocks, a norm, logits and their loss."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(KEPT))
        self.norm, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), labels.flatten())


def megatron_step(hidden: int, heads: int, layers: int, batch: int) -> Step:
    """The step of one rank."""
    with torch.device("meta"):
        model = Model(hidden, heads).to(torch.bfloat16)
        tokens = torch.empty(batch, LENGTH, dtype=torch.long)
    rewritten = sp.rewrite(model, "megatron", (tokens, tokens), world_size=RANKS, outputs="loss")
    return step_of(rewritten, fuse=False, runs={"blocks.1": LayerRun("blocks.1", layers - KEPT + 1)})
