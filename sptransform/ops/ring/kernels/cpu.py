"""PyTorch's flash attention for the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from sptransform.ops.ring.kernels.interface import Case, Grads, compute_dtype, rows_in_memory

aten = torch.ops.aten


def is_for_cpu(case: Case) -> bool:
    is_plain = case.head_dim == case.value_dim and not (case.explicit or case.softcap or case.windowed)
    return case.device == "cpu" and is_plain


def flash(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Computes 16-bit inputs in float32: rounding once per block would be less accurate than a single device."""
    dtype = compute_dtype(query.dtype)
    query, key, value = (rows_in_memory(x).to(dtype) for x in (query, key, value))
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, attn_mask=bias, scale=scale)


def flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> Grads:
    dtype = compute_dtype(query.dtype)
    grad, query, key, value, out = (rows_in_memory(x).to(dtype) for x in (grad, query, key, value, out))
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, lse, 0.0, causal, attn_mask=bias, scale=scale
    )
