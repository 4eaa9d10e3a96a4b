"""Models whose attention has a softcap, or sinks, as they spell it: Gemma 2 and GPT-OSS with eager attention."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM

from tests.support.equality import Result, assert_equal_to_one_device, run_one_device, worst_error
from tests.support.graphs import nodes_of
from tests.support.models import FLOAT32_PARTS, HEADS, HIDDEN, VOCAB, Inputs
from tests.support.rewritten import Asked, Ranks, on_pretended_ranks

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "sliding_window": 16,
}
LENGTH = 64


def gemma(**options: Any) -> nn.Module:
    config = {"attn_implementation": "eager", "attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 8} | options
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, **config))


def gpt_oss() -> nn.Module:
    """In float64 experts are computed one way only."""
    config = GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1, attn_implementation="eager")
    model = GptOssForCausalLM(config)
    model.set_experts_implementation("batched_mm")
    return model


def made(make: Any, **options: Any) -> nn.Module:
    """With noise in every parameter: sinks begin as zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(**options).double().train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs() -> Inputs:
    ids = torch.randint(2, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def collectives(ranks: Ranks) -> Counter[str]:
    targets = (str(node.target) for node in ranks.graphs[0].graph_module.graph.nodes)
    names = ("all_to_all", "all_gather", "reduce_scatter")
    return Counter(name for target in targets for name in names if name in target)


STRATEGIES = [Asked(2, "ulysses"), Asked(3, "ring"), Asked(2, "allgather"), Asked(2, "megatron"), Asked((2, 2), "usp")]


def assert_exact(model: nn.Module, reference: Result) -> None:
    for asked, ranks in on_pretended_ranks(model, inputs(), STRATEGIES).items():
        assert ranks.context.result.fallbacks == [], asked
        gm = ranks.graphs[0].graph_module
        assert len(nodes_of(gm, torch.ops.sptransform.ring_attention.default)) == 1
        if asked.strategy == "ulysses":
            assert collectives(ranks)["all_to_all"] == 2 and collectives(ranks)["all_gather"] == 0
        for result in ranks.results():
            assert_equal_to_one_device(reference, result, FLOAT32_PARTS)


@pytest.mark.slow
def test_a_model_with_a_softcap_is_exact() -> None:
    model = made(gemma)
    reference = run_one_device(model, inputs())
    uncapped = run_one_device(made(gemma, attn_logit_softcapping=None), inputs())
    assert worst_error(reference, uncapped)[1] > 1e-3, "the softcap has to matter"
    assert_exact(model, reference)


@pytest.mark.slow
def test_a_model_with_sinks_is_exact() -> None:
    model = made(gpt_oss)
    reference = run_one_device(model, inputs())
    assert reference.grads["model.layers.0.self_attn.sinks"].abs().min() > 1e-6
    assert_exact(model, reference)


@pytest.mark.slow
def test_a_softcap_costs_nothing_on_the_way() -> None:
    """The same collectives as without it, which is attention that torch has."""
    for asked in STRATEGIES:
        found = [
            collectives(on_pretended_ranks(made(gemma, attn_logit_softcapping=cap), inputs(), [asked])[asked])
            for cap in (1.5, None)
        ]
        assert found[0] == found[1], asked
