"""Models whose layers share a learned bias by distance: loss and gradients of one device, and no tensor of its size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import T5Config, T5ForConditionalGeneration

import sptransform
from sptransform.graph import dataflow
from sptransform.graph.printer import line
from sptransform.strategies.ring import AllGatherKV, Ring
from tests.support.equality import assert_equal_to_one_device, run_one_device
from tests.support.models import FLOAT64, VOCAB, Inputs
from tests.support.rewritten import Asked, Ranks, on_pretended_ranks

LENGTH, WIDTH, HEADS, ENTRIES = 36, 40, 8, 7

ASKED = [
    Asked(2, "ring"),
    Asked(3, Ring("contiguous")),
    Asked(2, "allgather"),
    Asked(4, AllGatherKV("contiguous")),
    Asked(4, "usp"),
    Asked(2, "ulysses"),
    Asked(2, "megatron"),
    Asked((2, 2), ("ring", "megatron")),
    Asked((2, 2), ("ulysses", "megatron")),
]
QUICK = [Asked(2, "ring"), Asked(2, "megatron")]


class Biased(nn.Module):
    """Two layers of grouped queries that share a table of a bias by distance; the first one has a window too."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.table = nn.Embedding(ENTRIES, HEADS)
        self.slopes = nn.Parameter(torch.randn(HEADS))
        self.layers = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(WIDTH, 2 * WIDTH), "out": nn.Linear(WIDTH, WIDTH)}) for _ in range(2)
        )

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.tokens(tokens)
        positions = torch.arange(tokens.shape[1])
        distance = positions[None] - positions[:, None]
        bias = self.table(distance.abs().clamp(max=ENTRIES - 1)).permute(2, 0, 1).unsqueeze(0)
        bias = (bias + self.slopes[:, None, None] * distance).masked_fill(distance > 0, -torch.inf)
        for i, layer in enumerate(self.layers):
            qkv = layer["qkv"](x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            query, key, value = qkv.split([HEADS, HEADS // 2, HEADS // 2], 1)
            mask = bias.masked_fill(distance < -9, -torch.inf) if i == 0 else bias
            out = functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
            x = x + layer["out"](out.transpose(1, 2).flatten(2))
        return functional.cross_entropy((x @ self.tokens.weight.T).flatten(0, 1), labels.flatten())


def biased() -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    tokens = torch.randint(VOCAB, (2, LENGTH))
    return Biased().double(), {"tokens": tokens, "labels": tokens.roll(-1, 1)}


def t5(implementation: str) -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 5, "d_ff": 64, "num_layers": 1, "num_heads": HEADS}
    model = T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)).double()
    model.set_attn_implementation(implementation)
    tokens = torch.randint(2, VOCAB, (2, LENGTH))
    return model, {"input_ids": tokens, "labels": tokens}


def squares(ranks: Ranks) -> list[str]:
    """Nodes with the dimensions of the scores, as one device or a rank has them."""
    sizes = {LENGTH // n for n in (1, 2, 3, 4)}
    nodes = [node for node in ranks.graphs[0].graph_module.graph.nodes if dataflow.is_tensor(node)]
    return [line(node) for node in nodes if sum(size in sizes for size in dataflow.shape(node)) > 1]


@pytest.mark.parametrize(
    ("make", "asked"),
    [
        pytest.param(make, asked, id=f"{name}, {asked}", marks=() if asked in quick else pytest.mark.slow)
        for name, make, quick in (
            ("biased", biased, QUICK),
            ("t5, sdpa", lambda: t5("sdpa"), []),
            ("t5, eager", lambda: t5("eager"), []),
        )
        for asked in ASKED
    ],
)
def test_models(make: Callable[[], tuple[nn.Module, Inputs]], asked: Asked) -> None:
    model, inputs = make()
    reference = run_one_device(model, inputs)
    tables = [name for name in reference.grads if "table" in name or "slopes" in name or "bias.weight" in name]
    assert tables and all(reference.grads[name].count_nonzero() for name in tables)
    (ranks,) = on_pretended_ranks(model, inputs, [asked]).values()
    assert not squares(ranks)
    for result in ranks.results():
        assert_equal_to_one_device(reference, result, FLOAT64)


def test_what_a_ring_does_for_a_learned_bias_is_shown() -> None:
    model, inputs = biased()
    shown = str(sptransform.explain(model, "ring", inputs, world_size=2, expand=True))
    for table in (f"f64[{HEADS},{ENTRIES}]", f"f64[{HEADS},1,1]"):
        assert f": {table} = sptransform.add_to_operand(" in shown
    assert "sptransform.attention_block_backward_with_mask" in shown
    assert "sptransform.attention_block_backward(" not in shown
