"""The large model of the docs: the shape of Llama 3 8B, on `meta`, where it takes no memory."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def llama_8b() -> LlamaForCausalLM:
    """Thirty-two layers in bfloat16."""
    config = LlamaConfig(
        num_hidden_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        vocab_size=128256,
        use_cache=False,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).bfloat16()


def inputs(tokens: int, rows: int) -> dict[str, torch.Tensor]:
    """Of that model, with labels."""
    ids = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
    return {"input_ids": ids, "labels": ids}
