"""Language models of Transformers whose logits exist for a chunk of tokens, each under every kind of strategy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.support.equality import assert_equal_to_one_device, run_one_device
from tests.support.models import FLOAT32_PARTS, FLOAT64, Inputs, build
from tests.support.rewritten import Asked, on_pretended_ranks

lce = torch.ops.sptransform.linear_cross_entropy.default
SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 4,
}


def gpt2() -> nn.Module:
    """Its head is its table of tokens."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=50,
            n_embd=24,
            n_layer=1,
            n_head=6,
            n_positions=32,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
        )
    )


def t5() -> nn.Module:
    """It scales what its head reads, whose weight is its table of tokens."""
    config = T5Config(vocab_size=50, d_model=24, d_kv=4, d_ff=32, num_layers=1, num_heads=6, dropout_rate=0.0)
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


# with how closely runs agree: most compute their loss in float32, whatever the dtype of the logits
MODELS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), FLOAT32_PARTS),
    "gemma-2": (lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, attn_implementation="eager")), FLOAT32_PARTS),
    "cohere": (lambda: CohereForCausalLM(CohereConfig(**SIZES)), FLOAT32_PARTS),
    "gpt-2": (gpt2, FLOAT32_PARTS),
    "t5": (t5, FLOAT64),
}


def model_and_inputs(name: str) -> tuple[nn.Module, Inputs, float]:
    if name == "bert":
        model, inputs = build("bert", layers=1, seq_len=30)
        return model, inputs, FLOAT64
    torch.manual_seed(0)
    make, tolerance = MODELS[name]
    ids = torch.randint(3, 48, (2, 30))
    labels = ids.index_fill(1, torch.arange(5), -100)
    return make().double(), {"input_ids": ids, "labels": labels, "use_cache": False}, tolerance


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ulysses", "ring", "megatron"])
@pytest.mark.parametrize("name", [*MODELS, "bert"])
def test_losses_in_chunks(name: str, strategy: str) -> None:
    model, inputs, tolerance = model_and_inputs(name)
    reference = run_one_device(model, inputs)
    asked = [Asked(2, strategy), Asked(3, strategy)]
    for ranks in on_pretended_ranks(model, inputs, asked, outputs="loss", loss_chunk=8).values():
        nodes = [node for node in ranks.graphs[0].graph_module.graph.nodes if node.target is lce]
        assert len(nodes) == 1
        assert bool(nodes[0].kwargs.get("classes")) == (strategy == "megatron")
        for result in ranks.results():
            assert_equal_to_one_device(reference, result, tolerance)
