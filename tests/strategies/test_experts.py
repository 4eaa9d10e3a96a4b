"""Mixtures of experts as Hugging Face writes them: each rank multiplies its own tokens' rows, and gathers nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sptransform import MegatronSP, Ring
from tests.support.equality import Result, assert_equal_to_one_device, run_one_device, worst_error
from tests.support.graphs import nodes_of
from tests.support.models import FLOAT32_PARTS, Inputs
from tests.support.rewritten import Asked, Runnable, on_pretended_ranks, step_of_first_scalar

VOCAB, HIDDEN, INNER, LENGTH, BATCH = 96, 32, 16, 40, 2
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "moe_intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
}
BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}


def qwen3(**changed: Any) -> nn.Module:
    options = {"num_experts": 4, "head_dim": 8} | changed
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**SIZES | options))


def qwen2() -> nn.Module:
    """Experts that every token goes through, beside those it chooses."""
    config = hf.Qwen2MoeConfig(**SIZES, num_experts=4, shared_expert_intermediate_size=24)
    return hf.Qwen2MoeForCausalLM(config)


def deepseek() -> nn.Module:
    """Groups of experts are chosen first, by a scatter."""
    config = hf.DeepseekV3Config(
        **SIZES, **LATENT, n_routed_experts=8, n_group=4, topk_group=2, n_shared_experts=1, first_k_dense_replace=0
    )
    return hf.DeepseekV3ForCausalLM(config)


def gpt_oss() -> nn.Module:
    """A bias for each expert; gates and values side by side."""
    return hf.GptOssForCausalLM(hf.GptOssConfig(**SIZES, num_local_experts=4, head_dim=8))


EXPERTS: dict[str, Callable[[], nn.Module]] = {
    "qwen3": qwen3,
    "one expert": functools.partial(qwen3, num_experts_per_tok=1),
    "all experts": functools.partial(qwen3, num_experts_per_tok=4),
    "experts that nobody chooses": functools.partial(qwen3, num_experts=100, num_experts_per_tok=3),
    "probabilities divided by their sum": functools.partial(qwen3, norm_topk_prob=True),
    "balanced": functools.partial(qwen3, **BALANCED),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, **BALANCED, num_local_experts=4)),
    "qwen2": qwen2,
    "olmoe": lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(**SIZES, num_experts=4)),
    "deepseek": deepseek,
    "gpt-oss": gpt_oss,
}
# lengths that ranks share evenly, zigzag, and not
ASKED = [Asked(2, "ulysses"), Asked(2, "ring"), Asked(3, Ring(layout="contiguous")), Asked(3, "megatron")]


def made(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    model = make().to(dtype).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH))
    return model, {"input_ids": ids, "labels": ids, "use_cache": False}


def one_device(model: nn.Module, inputs: Inputs) -> Result:
    """Each row with its expert's matrix: sorted rows have no float64 outside of a compiler."""
    model.set_experts_implementation("batched_mm")
    found = run_one_device(model, inputs)
    model.zero_grad()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "implementation"),
    [*((name, "grouped_mm") for name in EXPERTS), ("qwen3", "batched_mm"), ("gpt-oss", "batched_mm")],
)
def test_ranks_equal_one_device(name: str, implementation: str) -> None:
    """In float64, but for norms and routers, which models compute in float32."""
    model, inputs = made(EXPERTS[name])
    reference = one_device(model, inputs)
    model.set_experts_implementation(implementation)
    for each, ranks in on_pretended_ranks(model, inputs, ASKED).items():
        assert not ranks.context.result.fallbacks, f"{each}"
        for result in ranks.run(step_of_first_scalar):
            assert_equal_to_one_device(reference, result, FLOAT32_PARTS)


@pytest.mark.slow
def test_the_balance_counts() -> None:
    """What the comparison above would see if a rank had its own tokens' balance only."""
    model, inputs = made(EXPERTS["balanced"])
    reference = one_device(model, inputs)
    model.router_aux_loss_coef *= 0.99
    assert worst_error(reference, one_device(model, inputs))[1] > 100 * FLOAT32_PARTS


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ulysses", "ring"])
def test_each_rank_multiplies_its_own_rows(strategy: str) -> None:
    """FLOPs, counted: in all, those of one device."""
    num_ranks, layers, choices = 4, SIZES["num_hidden_layers"], SIZES["num_experts_per_tok"]
    model, inputs = made(qwen3)
    model.set_experts_implementation("grouped_mm")
    (ranks,) = on_pretended_ranks(model, inputs, [Asked(num_ranks, strategy)]).values()
    assert not nodes_of(ranks.graphs[0].graph_module, torch.ops.sptransform.all_gather.default) or strategy == "ring"

    def product(rows: Any, weight: Any, *shapes: Any, out_shape: Any = None, **_: Any) -> int:
        return 2 * rows[0] * weight[1] * weight[2] * (2 if len(shapes) == 2 else 1)

    experts = torch.ops.transformers
    mapping = {experts.grouped_mm_fallback: product, experts.grouped_mm_fallback_backward: product}

    def counted(graph: Runnable) -> int:
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            step_of_first_scalar(graph)
        return sum(counter.get_flop_counts()["Global"][op] for op in mapping)

    of_a_row = 2 * HIDDEN * 3 * INNER * 3  # up, gate and down; once forward, twice backward
    assert ranks.run(counted) == [BATCH * LENGTH * choices // num_ranks * layers * of_a_row] * num_ranks


@pytest.mark.slow
def test_experts_are_cut_along_their_width() -> None:
    """Column-parallel, then row-parallel; tokens are gathered as they are, not once for each expert they chose."""
    model, inputs = made(qwen3)
    model.set_experts_implementation("grouped_mm")
    (ranks,) = on_pretended_ranks(model, inputs, [Asked(2, MegatronSP())]).values()
    up, down, *_ = nodes_of(ranks.graphs[0].graph_module, torch.ops.sptransform.grouped_product.default)
    shapes = [tuple(x.meta["val"].shape) for x in (*up.args[:2], *down.args[:2])]
    rows = BATCH * LENGTH
    assert shapes == [(rows, HIDDEN), (4, HIDDEN, INNER), (2 * rows, INNER // 2), (4, INNER // 2, HIDDEN)]
