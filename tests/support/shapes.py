"""A small decoder of any number of heads, for lengths, heads and batches that do not divide by the number of ranks."""

import itertools
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from tests.support.models import IGNORED, MAX_LENGTH, Inputs

VOCAB, HEAD_DIM = 31, 4
HEADS = [(8, 8), (8, 2), (8, 1), (6, 2), (5, 5), (3, 1), (7, 7), (28, 4), (12, 3)]
BATCHES = [1, 2, 3, 5]


@dataclass(frozen=True)
class Case:
    """A shape on a number of ranks; `outputs` matters for models that return more than a loss."""

    num_ranks: int
    heads: tuple[int, int]
    seq_len: int
    batch: int
    repeat: bool = False
    split: str = "heads"

    def __str__(self) -> str:
        heads, key_heads = self.heads
        form = "-repeat" * self.repeat + "-batch" * (self.split == "batch")
        return f"N{self.num_ranks}-H{heads}-K{key_heads}-S{self.seq_len}-B{self.batch}{form}"


def lengths(num_ranks: int) -> list[int]:
    return [n for n in dict.fromkeys((64, 61, 7, num_ranks - 1, 1)) if n > 0]


# Every number of ranks, length, pair of heads and batch at least once; each odd one with an even and an odd other.
SOME = [
    Case(1, (8, 8), 64, 2),
    Case(2, (5, 5), 61, 3),
    Case(2, (6, 2), 7, 5, repeat=True),
    Case(2, (7, 7), 1, 2),
    Case(3, (8, 1), 64, 3, repeat=True),
    Case(3, (28, 4), 61, 1),
    Case(3, (3, 1), 2, 5, split="batch"),
    Case(4, (8, 2), 64, 1),
    Case(4, (12, 3), 61, 2, repeat=True),
    Case(4, (3, 1), 7, 2),
    Case(4, (8, 8), 3, 5, split="batch"),
]
# All numbers of ranks, heads, lengths and batches; the two ways to write and to split take turns.
ALL = [
    Case(num_ranks, heads, seq_len, batch, repeat=i % 2 == 1, split="batch" if i % 3 == 2 and batch > 1 else "heads")
    for num_ranks in (1, 2, 3, 4)
    for heads in HEADS
    for i, (seq_len, batch) in enumerate(itertools.product(lengths(num_ranks), BATCHES))
]


def build_shape(
    heads: int, key_heads: int, batch: int, seq_len: int, repeat: bool, *, num_layers: int = 2
) -> tuple[nn.Module, Inputs]:
    """The model in float64 and its inputs, the same at every call; the first third of the labels does not count.

    With ``repeat`` the model repeats its key heads itself, as Hugging Face's do; without, attention does.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ShapedDecoder(heads, key_heads, repeat, num_layers).double()
        input_ids = torch.randint(0, VOCAB, (batch, seq_len))
    labels = input_ids.clone()
    labels[:, : seq_len // 3] = IGNORED
    return model, {"input_ids": input_ids, "labels": labels}


class ShapedDecoder(nn.Module):
    """Grouped-query attention blocks between an embedding and a head; returns the loss of the next token."""

    def __init__(self, heads: int, key_heads: int, repeat: bool, num_layers: int) -> None:
        super().__init__()
        hidden = heads * HEAD_DIM
        self.tokens = nn.Embedding(VOCAB, hidden)
        self.positions = nn.Embedding(MAX_LENGTH, hidden)
        self.blocks = nn.ModuleList(ShapedBlock(heads, key_heads, repeat) for _ in range(num_layers))
        self.head = nn.Linear(hidden, VOCAB, bias=False)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            x = block(x)
        labels = functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        return functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


class ShapedBlock(nn.Module):
    """Attention behind a layer norm."""

    def __init__(self, heads: int, key_heads: int, repeat: bool) -> None:
        super().__init__()
        self.heads, self.key_heads, self.repeat = heads, key_heads, repeat
        hidden = heads * HEAD_DIM
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, key_heads * HEAD_DIM)
        self.value = nn.Linear(hidden, key_heads * HEAD_DIM)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, seq_len, hidden = x.shape
        y = functional.layer_norm(x, (hidden,))
        query = self.query(y).view(batch, seq_len, self.heads, HEAD_DIM).transpose(1, 2)
        key = self.key(y).view(batch, seq_len, self.key_heads, HEAD_DIM).transpose(1, 2)
        value = self.value(y).view(batch, seq_len, self.key_heads, HEAD_DIM).transpose(1, 2)
        if self.repeat:
            key = key.repeat_interleave(self.heads // self.key_heads, 1)
            value = value.repeat_interleave(self.heads // self.key_heads, 1)
        attended = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=not self.repeat
        )
        return x + self.out(attended.transpose(1, 2).reshape(batch, seq_len, hidden))
