"""Real models whose structure asks for more than attention and linears: images among text, experts, shared keys.

Each under three strategies, on ranks in lockstep, in float64 but for what the models compute in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from sptransform import CaptureError
from tests.support.equality import assert_equal_to_one_device, run_one_device
from tests.support.rewritten import Asked, on_pretended_ranks, step_of_first_scalar
from tests.support.tiers import tiered

Made = tuple[nn.Module, dict[str, Any]]

VOCAB, HIDDEN, LENGTH, IMAGE = 96, 32, 40, 90
TEXT = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
VISION = {
    "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
# what is computed in float32 is rounded otherwise where it is summed otherwise
TOLERANCE = 5e-6


def prepared(model: nn.Module, scale: float = 0.1) -> nn.Module:
    """With noise on every parameter, lest attention is near uniform and a wrong mask moves nothing."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=draw))
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # grouped_mm has no float64
    return model.double().train()


def tokens(high: int = 88) -> torch.Tensor:
    return torch.randint(3, high, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def image_features_among_text() -> Made:
    """A vision tower whose features take the places of image tokens (masked_scatter), after a check of their number."""
    config = transformers.LlavaConfig(
        text_config=TEXT | {"model_type": "llama"}, vision_config=VISION | {"model_type": "clip_vision_model"},
        image_token_index=IMAGE, image_seq_length=16, vision_feature_layer=-1,
    )  # fmt: skip
    ids = tokens()
    ids[:, 5:21] = IMAGE
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    labels = ids.masked_fill(ids == IMAGE, -100)
    mask = torch.ones_like(ids)
    inputs = {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask, "labels": labels, "use_cache": False}
    return transformers.LlavaForConditionalGeneration(config), inputs


class _WithFeatures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0, "mrope_interleaved": True}
        self.language = transformers.Qwen3VLTextModel(transformers.Qwen3VLTextConfig(**TEXT, rope_parameters=rope))

    def forward(self, input_ids: torch.Tensor, places: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        hidden = self.language(
            input_ids=input_ids, visual_pos_masks=places, deepstack_visual_embeds=[features], use_cache=False
        ).last_hidden_state
        return hidden.pow(3).mean()


def features_added_by_a_boolean_index() -> Made:
    places = torch.zeros(2, LENGTH, dtype=torch.bool)
    places[0, 6:12], places[1, 18:23] = True, True
    features = torch.randn(11, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return _WithFeatures(), {"input_ids": tokens(), "places": places, "features": features}


def experts_with_a_balance_loss_recomputed() -> Made:
    """A lock and hooks inside of the call, experts whose probabilities are divided in place, layers recomputed."""
    config = transformers.Qwen3MoeConfig(
        **TEXT, **EXPERTS, norm_topk_prob=True, output_router_logits=True, router_aux_loss_coef=0.5
    )
    model = transformers.Qwen3MoeForCausalLM(config)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    mask = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [17]])).long()
    labels = tokens().masked_fill(mask == 0, -100)
    return model, {"input_ids": tokens(), "attention_mask": mask, "labels": labels, "use_cache": False}


def keys_shared_by_layers() -> Made:
    config = transformers.Gemma4TextConfig(
        **TEXT | {"num_hidden_layers": 4}, global_head_dim=8, num_kv_shared_layers=2, sliding_window=12,
        layer_types=["sliding_attention", "full_attention"] * 2, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
    )  # fmt: skip
    return transformers.Gemma4ForCausalLM(config), {"input_ids": tokens(), "labels": tokens(), "use_cache": False}


MODELS: dict[str, Callable[[], Made]] = {
    made.__name__: made
    for made in (
        image_features_among_text,
        features_added_by_a_boolean_index,
        experts_with_a_balance_loss_recomputed,
        keys_shared_by_layers,
    )
}
CASES = [
    (name, Asked(num_ranks, strategy))
    for name in MODELS
    for strategy in ("ulysses", "ring", "megatron")
    for num_ranks in (2, 3)
]
QUICK = [
    ("image_features_among_text", Asked(3, "ring")),
    ("experts_with_a_balance_loss_recomputed", Asked(2, "ulysses")),
]


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("name", "asked"), tiered(CASES, quick=QUICK), ids=lambda each: str(each).replace(" ", "-"))
def test_loss_and_gradients(name: str, asked: Asked) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model = prepared(model)
    if name == "image_features_among_text" and torch.__version__ < "2.12":  # its Dynamo fails, with any backend
        with pytest.raises(CaptureError, match=r"torch.compile failed (.|\n)*masked_scatter"):
            on_pretended_ranks(model, inputs, [asked])
        return
    ranks = on_pretended_ranks(model, inputs, [asked])[asked]
    reference = run_one_device(model, inputs)
    for result in ranks.run(step_of_first_scalar):
        assert_equal_to_one_device(reference, result, TOLERANCE)
