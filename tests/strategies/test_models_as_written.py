"""Models as they are written, at lengths that ranks do not share evenly, under every strategy: one device's gradients.

What only meets here: an encoder and a decoder of different lengths under padding and a learned bias; torch's own module
in each of its forms; documents under a softcap, and under sinks, with the same graphs whatever their boundaries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import T5Config, T5ForConditionalGeneration

import sptransform.integrations.transformers  # noqa: F401 - registers it
from sptransform.strategies.ring import AllGatherKV, Ring
from sptransform.strategies.usp import USP
from tests.integrations import dense  # noqa: F401 - registers it
from tests.integrations.cases import positions
from tests.strategies.test_capped_models import gemma, gpt_oss, made
from tests.support.equality import assert_equal_to_one_device, run_one_device
from tests.support.models import FLOAT32_PARTS, FLOAT64, VOCAB, Inputs
from tests.support.rewritten import Asked, Ranks, on_pretended_ranks
from tests.support.tiers import tiered

WIDTH, HEADS = 32, 4
STRATEGIES = [
    Asked(2, "ulysses"), Asked(3, "ulysses"), Asked(3, "ring"), Asked(4, Ring("striped")), Asked(2, "allgather"),
    Asked(4, AllGatherKV("striped", block=2)), Asked(3, "megatron"), Asked(4, USP(2, 2)),
]  # fmt: skip


def tokens(length: int, seed: int = 1) -> Tensor:
    return torch.randint(2, VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))


def t5() -> nn.Module:
    sizes = {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": HEADS}
    buckets = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
    model = T5ForConditionalGeneration(T5Config(**sizes, **buckets, dropout_rate=0.0, decoder_start_token_id=0))
    model.set_attn_implementation("eager")
    return model


def padded_pair() -> Inputs:
    mask = torch.ones(2, 23, dtype=torch.long)
    mask[0, 14:] = 0
    return {"input_ids": tokens(23), "attention_mask": mask, "labels": tokens(17, seed=2)}


class OfTorch(nn.Module):
    """Attention of `nn.MultiheadAttention` in one of its forms, between two products, and a loss."""

    def __init__(self, batch_first: bool, **options: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)
        self.batch_first, self.options = batch_first, options

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids if self.batch_first else input_ids.T)
        length = input_ids.shape[1]
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        y, _ = self.attention(x, x, x, attn_mask=hidden, **self.options)
        logits = (x + y) @ self.tokens.weight.T
        labels = input_ids if self.batch_first else input_ids.T
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def only_tokens() -> Inputs:
    return {"input_ids": tokens(23)}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs], float]] = {
    "t5": (t5, padded_pair, FLOAT64),
    "weights": (lambda: OfTorch(True, need_weights=True), only_tokens, FLOAT64),
    "sequence first, weights": (lambda: OfTorch(False, need_weights=True), only_tokens, FLOAT64),
    "is_causal": (lambda: OfTorch(True, need_weights=False, is_causal=True), only_tokens, FLOAT64),
}
QUICK = [("sequence first, weights", STRATEGIES[6])]


@pytest.mark.parametrize(
    ("name", "asked"), tiered([(name, asked) for name in MODELS for asked in STRATEGIES], quick=QUICK), ids=str
)
def test_models(name: str, asked: Asked) -> None:
    make, inputs, tolerance = MODELS[name]
    model, given = made(make), inputs()
    reference = run_one_device(model, given)
    model.zero_grad()
    (ranks,) = on_pretended_ranks(model, given, [asked]).values()
    assert ranks.context.result.fallbacks == []
    for result in ranks.results():
        assert_equal_to_one_device(reference, result, tolerance)


# of 23 tokens: within shards, at edges of 2, 3 and 4 ranks, one off them, one document, documents of a token
BOUNDARIES = [
    ([3, 9, 11], [5, 14, 4]),
    ([6, 2, 4, 4, 2, 5], [8, 8, 7]),
    ([7, 6, 6, 4], [5, 2, 4, 4, 8]),
    ([23], [1] * 23),
    ([1, 21, 1], [22, 1]),
]


def with_boundaries(ranks: Ranks, old: Tensor, new: Tensor) -> Ranks:
    """The same graphs, called with other position ids."""

    def changed(x: object) -> object:
        return new if isinstance(x, Tensor) and torch.equal(x, old) else x

    return Ranks([replace(graph, inputs=[changed(x) for x in graph.inputs]) for graph in ranks.graphs])


@pytest.mark.parametrize(
    ("make", "implementation", "asked"),
    tiered(
        [(make, how, asked) for make in (gemma, gpt_oss) for how in ("eager", "sptransform") for asked in STRATEGIES],
        quick=[(gemma, "eager", STRATEGIES[4]), (gpt_oss, "sptransform", STRATEGIES[2])],
    ),
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_graphs_serve_any_boundaries(make: Callable[[], nn.Module], implementation: str, asked: Asked) -> None:
    """Documents inside of a window, at odd lengths, with a softcap or sinks."""
    model, given = made(make), {"input_ids": tokens(23), "labels": tokens(23), "use_cache": False}
    of_rows: Sequence[Tensor] = [torch.cat([positions(sizes) for sizes in rows]) for rows in BOUNDARIES]
    model.set_attn_implementation(implementation)
    inputs = given | {"position_ids": of_rows[0]}
    (ranks,) = on_pretended_ranks(model, inputs, [asked]).values()
    model.set_attn_implementation("eager" if implementation == "eager" else "dense")
    for position_ids in of_rows:
        model.zero_grad()
        reference = run_one_device(model, given | {"position_ids": position_ids})
        for result in with_boundaries(ranks, of_rows[0], position_ids).results():
            assert_equal_to_one_device(reference, result, FLOAT32_PARTS)
