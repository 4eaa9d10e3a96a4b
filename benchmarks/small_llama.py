"""A small Llama with random weights, equal on all ranks, for benchmarks of what does not depend on its size."""

from __future__ import annotations

from typing import Any

import torch
import transformers


def small_llama(
    num_layers: int, hidden: int, heads: int, vocabulary: int, **options: Any
) -> transformers.LlamaForCausalLM:
    """``options``: further ones of its config."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        **options,
    )
    return transformers.LlamaForCausalLM(config)
