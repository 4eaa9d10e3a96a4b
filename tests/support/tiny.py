"""One attention layer and a cross-entropy: for tests whose subject is not the model."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tests.support.models import IGNORED, VOCAB, Inputs

BATCH, SEQ_LEN, WIDTH, NUM_HEADS = 2, 16, 16, 4


class Attention(nn.Module):
    """One attention between an embedding and a head; returns logits."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, seq_len = tokens.shape
        qkv = self.qkv(self.tokens(tokens)).view(batch, seq_len, 3, NUM_HEADS, WIDTH // NUM_HEADS)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.head(self.between(attended.transpose(1, 2).reshape(batch, seq_len, WIDTH)))

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x


class AttentionWithLoss(Attention):
    """The same under a cross-entropy of these arguments."""

    def __init__(self, **loss: Any) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(super().forward(tokens).flatten(0, 1), labels.flatten(), **self.loss)


def token_inputs() -> Inputs:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (BATCH, SEQ_LEN), generator=generator)
    labels = tokens.roll(-1, 1)
    labels[:, -3:] = IGNORED
    return {"tokens": tokens, "labels": labels}


def attention() -> Attention:
    """In float64, the same at every call."""
    torch.manual_seed(0)
    return Attention().double()


def attention_with_loss(**loss: Any) -> AttentionWithLoss:
    """In float64, the same at every call; a `weight` among the arguments stands for random class weights."""
    torch.manual_seed(0)
    if "weight" in loss:
        loss["weight"] = torch.rand(VOCAB, dtype=torch.float64)
    return AttentionWithLoss(**loss).double()
