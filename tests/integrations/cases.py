"""Small models of Transformers and inputs with all that masks are made of."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.support.models import IGNORED, Inputs

VOCAB, LENGTH, WINDOW = 97, 64, 16
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "use_cache": False,
}
LATENT = {
    "num_key_value_heads": 8,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
SINKS = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "sliding_window": WINDOW}


def _make(model: Any, config: Any, own: dict[str, Any], layers: int) -> nn.Module:
    return model(config(**COMMON | own | {"num_hidden_layers": layers}))


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "llama": partial(_make, hf.LlamaForCausalLM, hf.LlamaConfig, {}),
    "mistral": partial(_make, hf.MistralForCausalLM, hf.MistralConfig, {"sliding_window": WINDOW}),
    "qwen3": partial(_make, hf.Qwen3ForCausalLM, hf.Qwen3Config, {"head_dim": 8}),
    "qwen3_moe": partial(_make, hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig, EXPERTS),
    "deepseek_v3": partial(_make, hf.DeepseekV3ForCausalLM, hf.DeepseekV3Config, LATENT),
    "gemma2": partial(_make, hf.Gemma2ForCausalLM, hf.Gemma2Config, {"head_dim": 8, "sliding_window": WINDOW}),
    "gpt_oss": partial(_make, hf.GptOssForCausalLM, hf.GptOssConfig, SINKS),
}
WITHOUT_SDPA = {"gemma2", "gpt_oss"}


def build(name: str, implementation: str, layers: int = 2) -> nn.Module:
    """The model in float64, with noise on every parameter as `tests/support/models.py` says; the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name](layers).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.set_attn_implementation(implementation)
    if any("experts" in key for key, _ in model.named_modules()):
        model.set_experts_implementation("batched_mm")  # others have no float64
    return model.train()


def positions(sizes: Sequence[int]) -> Tensor:
    """Position ids [1, S] of documents of these sizes."""
    return torch.cat([torch.arange(size) for size in sizes])[None]


# boundaries of 2 and 4 ranks are at 16, 32 and 48 of 64: inside a shard, one off its edge, on it; and a token alone
DOCUMENTS = [7, 1, 23, 1, 16, 1, 15]
ENDS = torch.tensor([0, *DOCUMENTS]).cumsum(0).to(torch.int32)


def _tokens(batch: int, length: int = LENGTH) -> Inputs:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        ids = torch.randint(VOCAB, (batch, length))
        labels = ids.masked_fill(torch.rand(batch, length) < 0.1, IGNORED)
    labels[0, : length // 5] = IGNORED
    return {"input_ids": ids, "labels": labels}


def _padded(batch: int, *, left: int = 0, right: int = 0) -> Inputs:
    """Padding of a row at its left, and of another at its right."""
    inputs = _tokens(batch)
    mask = torch.ones(batch, LENGTH, dtype=torch.long)
    mask[0, :left] = 0
    mask[-1, LENGTH - right :] = 0
    return inputs | {"attention_mask": mask, "labels": inputs["labels"].masked_fill(mask == 0, IGNORED)}


def _packed(*rows: Sequence[int]) -> Inputs:
    inputs = _tokens(len(rows), sum(rows[0]))
    position_ids = torch.cat([positions(sizes) for sizes in rows])
    return inputs | {"position_ids": position_ids, "labels": inputs["labels"].masked_fill(position_ids == 0, IGNORED)}


def _packed_and_padded() -> Inputs:
    """Documents, then padding; before them padding whose positions say nothing."""
    inputs = _padded(2, left=20, right=20)
    starts = positions([20, 13, 31]), positions([30, 14, 20])
    return inputs | {"position_ids": torch.cat(starts)}


def _by_lengths() -> Inputs:
    inputs = _packed(DOCUMENTS)
    return inputs | {"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS}  # one tensor, twice


INPUTS: dict[str, Callable[[], Inputs]] = {
    "plain": partial(_tokens, 2),
    "one_row": partial(_tokens, 1),
    "left": partial(_padded, 2, left=37),
    "right": partial(_padded, 2, right=37),
    "both_sides": partial(_padded, 1, left=9, right=20),
    "packed": partial(_packed, DOCUMENTS),
    "packed_rows": partial(_packed, DOCUMENTS, [64], [32, 32]),
    "packed_odd": partial(_packed, [20, 1, 30, 10]),
    "packed_and_padded": _packed_and_padded,
    "lengths": _by_lengths,
}
