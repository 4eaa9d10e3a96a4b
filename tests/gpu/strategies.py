"""Every strategy on pretended ranks whose tensors are on the device, against one device there."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import sptransform.integrations.transformers  # noqa: F401 - registers its attention
from sptransform.strategies.ring import Ring
from sptransform.testing.pretended import Asked, Ranks, on_pretended_ranks
from tests.gpu.figures import Check, Errors
from tests.support.equality import Result, worst_error
from tests.support.models import CausalTransformer

VOCAB, LENGTH, BATCH = 97, 96, 2
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "use_cache": False,
}
STRATEGIES = (
    Asked(2, "ulysses"),
    Asked(3, "ulysses"),
    Asked(4, "ring"),
    Asked(3, Ring("contiguous")),
    Asked(2, Ring("striped")),
    Asked(4, "allgather"),
    Asked((2, 2), "usp"),
    Asked(2, "megatron"),
    Asked((2, 2), ("ring", "megatron")),
)
DOCUMENTS = (30, 1, 33, 32)
# errors beside one device: rounding of float32, and of 16 bits as a multiple of what one device has
FLOAT32, TIMES = 2e-5, 2.0


@dataclass(frozen=True)
class Model:
    """How to make it, what it is called with, and in which dtypes.

    ``exact``: the error of a run in float64; ``device``: the only one that runs it, if there is one.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    dtypes: tuple[torch.dtype, ...]
    exact: float = 1e-6
    device: str | None = None


def _tokens() -> dict[str, Tensor]:
    ids = torch.randint(VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :20] = -100
    return {"input_ids": ids, "labels": labels}


def _padded() -> dict[str, Tensor]:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, 70:] = 0
    return {"attention_mask": mask, **_tokens()}


def _packed() -> dict[str, Tensor]:
    positions = torch.cat([torch.arange(size) for size in DOCUMENTS]).expand(BATCH, -1)
    return {"position_ids": positions, **_tokens()}


def _llama(attention: str) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation=attention))


def _mistral() -> nn.Module:
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=20, attn_implementation="sptransform"))


def _experts() -> nn.Module:
    config = Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, attn_implementation="sdpa"
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


_ALL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SOME = (torch.float64, torch.bfloat16)
MODELS = {
    "written by hand": Model(lambda: CausalTransformer(1), _tokens, _ALL, exact=1e-12),
    "padded": Model(partial(_llama, "sdpa"), _padded, _SOME),
    "packed documents": Model(partial(_llama, "sptransform"), _packed, _SOME),
    "spelled out": Model(partial(_llama, "eager"), _tokens, _SOME),
    "flex_attention": Model(partial(_llama, "flex_attention"), _tokens, (torch.float32,), device="cuda"),
    "sliding window": Model(_mistral, _tokens, _SOME),
    "experts": Model(_experts, _tokens, (torch.bfloat16,)),
}


def checks(device: str, *, bits: Container[int] = (16, 32, 64)) -> list[Check]:
    """``bits``: of the dtypes."""
    return [
        Check("strategies", f"{name}, {str(dtype).removeprefix('torch.')}", partial(_compare, name, dtype, device))
        for name, model in MODELS.items()
        if model.device in (None, device)
        for dtype in model.dtypes
        if dtype.itemsize * 8 in bits
    ]


def build(name: str, dtype: torch.dtype, device: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model with noise on every parameter, rounded to ``dtype``, and its inputs."""
    torch.manual_seed(0)
    model = MODELS[name].make().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    inputs = {key: x.to(device) for key, x in MODELS[name].inputs().items()}
    return model.to(dtype).to(device).train(), inputs


def one_device(model: nn.Module, inputs: dict[str, Tensor]) -> Result:
    """Eagerly, in the dtype of the model."""
    model.zero_grad()
    found = model(**inputs)
    loss = found if isinstance(found, Tensor) else found.loss
    loss.backward()
    return Result(loss.detach(), {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None})


def _compare(name: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    model, inputs = build(name, dtype, device)
    own = one_device(model, inputs)
    if dtype.itemsize == 2:
        exact = one_device(model.float(), inputs)
        reference, bound = exact, TIMES * max(worst_error(exact, own)[1], torch.finfo(dtype).eps)
        model.to(dtype)
    else:
        reference, bound = own, MODELS[name].exact if dtype == torch.float64 else FLOAT32
    errors = Errors(bound)
    for asked, ranks in on_pretended_ranks(model, inputs, STRATEGIES, outputs="loss").items():
        errors.add(str(asked), partial(_errors, ranks, reference))
    return errors.figures()


def _errors(ranks: Ranks, reference: Result) -> dict[str, float]:
    """The worst tensor of each rank."""
    return {f"on rank {result.rank}": worst_error(reference, result)[1] for result in ranks.results()}
