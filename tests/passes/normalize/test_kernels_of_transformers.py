"""Hugging Face's models with flash-attn, which is stood in for, and with flex_attention, as they call them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

import sptransform
from sptransform.diagnostics.errors import CaptureError
from tests.support.equality import assert_equal_to_one_device, run_one_device
from tests.support.flash_attn_stand_in import flash_attn_func, flash_attn_varlen_func
from tests.support.models import FLOAT32_PARTS
from tests.support.rewritten import Asked, on_pretended_ranks
from tests.support.tiers import tiered

LENGTH, FIRST = 48, 20
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 9,
    "use_cache": False,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    # a window, softcaps and a scale of its own
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, query_pre_attn_scalar=5)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES)),
}


@pytest.fixture(autouse=True)
def _kernels_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    functions = flash_attn_func, flash_attn_varlen_func, None, flash._pad_input, flash._unpad_input
    monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **options: functions)
    monkeypatch.setattr(flash, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    yield


def build(name: str, attention: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().double()
    for module in model.modules():
        if hasattr(module, "config"):  # asked for by name, the implementation would be looked for
            module.config._attn_implementation_internal = attention
    return model


def inputs(batch: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 97, (batch, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def positions(batch: int) -> Tensor:
    """Of two documents in each sequence."""
    return torch.cat([torch.arange(FIRST), torch.arange(LENGTH - FIRST)]).expand(batch, -1)


def ends(batch: int) -> dict[str, Any]:
    """The same documents, the sequences one after the other, as a data collator gives them."""
    found = torch.tensor([0] + [i * LENGTH + end for i in range(batch) for end in (FIRST, LENGTH)], dtype=torch.int32)
    longest = LENGTH - FIRST
    return {"cu_seq_lens_q": found, "cu_seq_lens_k": found, "max_length_q": longest, "max_length_k": longest}


# name -> the attention, and what the call has beside tokens: on one device in eager mode, and in the kernel's
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "flash": ("flash_attention_2", {}, {}),
    "flash_packed": ("flash_attention_2", {"position_ids": positions(1)}, ends(1)),
    "flash_packed_batch": ("flash_attention_2", {"position_ids": positions(2)}, ends(2)),
    "flex": ("flex_attention", {}, {}),
    "flex_packed": ("flex_attention", {"position_ids": positions(2)}, {}),
}
STRATEGIES = [Asked(2, "ulysses"), Asked(3, "ring"), Asked(2, "megatron")]


@pytest.mark.parametrize(
    ("name", "case"),
    tiered([(name, case) for name in MODELS for case in CASES], quick=[("gemma2", "flash_packed")]),
)
def test_a_model_is_exact(name: str, case: str) -> None:
    attention, of_eager, of_kernel = CASES[case]
    call = inputs(1 if case == "flash_packed" else 2)
    reference = run_one_device(build(name, "eager"), call | of_eager)
    for asked, ranks in on_pretended_ranks(build(name, attention), call | of_eager | of_kernel, STRATEGIES).items():
        assert ranks.context.result.fallbacks == [], asked
        for result in ranks.results():
            assert_equal_to_one_device(reference, result, FLOAT32_PARTS)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_padding_is_refused_by_name(attention: str) -> None:
    """Both look whether there is any."""
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, FIRST:] = 0
    with pytest.raises(CaptureError, match=r"by what a tensor holds(.|\n)*transformers/(.|\n)*fix: .*'sdpa'"):
        call = inputs(2) | {"attention_mask": mask}
        sptransform.rewrite(build("mistral", attention), "ulysses", call, world_size=2)


def test_the_comparison_sees_a_document() -> None:
    call = inputs(1) | {"position_ids": positions(1)}
    reference = run_one_device(build("mistral", "eager"), inputs(1))
    with pytest.raises(AssertionError, match="differs from one device"):
        assert_equal_to_one_device(reference, run_one_device(build("mistral", "eager"), call), FLOAT32_PARTS)
