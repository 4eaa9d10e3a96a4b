"""A stand-in of FlashAttention 3, which runs on GPUs only: its op, and the function that takes packed documents.

The schema is that of ``hopper/flash_attn_interface.py`` of flash-attn, and the ``autograd.Function`` calls the op as
the one there. What is behind the op is ours, see `tests/support/flash_attn_stand_in.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.support.flash_attn_stand_in import _gradients, attention_of, attention_of_documents


def _definition(q: Tensor, k: Tensor, v: Tensor, ends: Any, key_ends: Any, *options: Any) -> Tensor:
    if ends is None:
        return attention_of(q, k, v, *options).contiguous()
    return attention_of_documents(q, k, v, ends, key_ends, *options)


@torch.library.custom_op("flash_attn_3::_flash_attn_forward", mutates_args=())
def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    qv: Tensor | None = None,
    out_: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    kv_batch_idx: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    seqlens_rotary: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    window = window_size_left, window_size_right
    out = _definition(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window, softcap)
    return out, *(q.new_zeros(0) for _ in range(3))


@_flash_attn_forward.register_fake
def _(q: Tensor, *args: Any, **options: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(q), *(q.new_empty(0) for _ in range(3))


@torch.library.custom_op("flash_attn_3::_flash_attn_backward", mutates_args=("dq", "dk", "dv"))
def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sequed_q: Tensor | None = None,
    sequed_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> Tensor:
    options = cu_seqlens_q, cu_seqlens_k, softmax_scale, is_causal, (window_size_left, window_size_right), softcap
    _gradients(lambda *x: _definition(*x, *options), dout, (q, k, v), (dq, dk, dv))
    return q.new_zeros(())


@_flash_attn_backward.register_fake
def _(dout: Tensor, *args: Any, **options: Any) -> Tensor:
    return dout.new_empty(())


class FlashAttnVarlenFunc(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
                window_size, attention_chunk, softcap, deterministic, return_softmax):  # fmt: skip
        if softmax_scale is None:
            softmax_scale = q.shape[-1] ** (-0.5)
        out, softmax_lse, *_ = _flash_attn_forward(
            q, k, v, None, None, None, None, cu_seqlens_q, cu_seqlens_k, None, None, None, max_seqlen_q, max_seqlen_k,
            None, None, None, None, None, None, None, None, None, softmax_scale, causal=causal,
            window_size_left=window_size[0], window_size_right=window_size[1], attention_chunk=attention_chunk,
            softcap=softcap, num_splits=1, pack_gqa=None, sm_margin=0,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k)
        ctx.lengths = max_seqlen_q, max_seqlen_k
        ctx.options = softmax_scale, causal, *window_size, softcap, deterministic, 0
        return (out, softmax_lse) if return_softmax else out

    @staticmethod
    def backward(ctx, dout, *args):
        q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _flash_attn_backward(
            dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, None, None, *ctx.lengths, dq, dk, dv,
            *ctx.options,
        )  # fmt: skip
        dq, dk, dv = dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]
        return dq, dk, dv, *(None,) * 11


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None,
                           causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, deterministic=False,
                           return_attn_probs=False):  # fmt: skip
    return FlashAttnVarlenFunc.apply(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size,
        attention_chunk, softcap, deterministic, return_attn_probs,
    )  # fmt: skip
