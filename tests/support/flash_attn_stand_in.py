"""Stand-ins of flash-attn 2.8, which runs on GPUs only: its functions and ops by the same names, on a CPU.

The functions, the ``autograd.Function``s between and the schemas of the ops are those of
``flash_attn/flash_attn_interface.py`` of flash-attn 2.8, so that what Dynamo captures of a model is the same. Only what
is behind the ops is ours: they compute what that file's docstrings define, one document after the other, in the dtype
of the queries. Rows of no document are zero, here; the kernels leave what was in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Window = tuple[int, int]


def attention_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    window: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """The definition: q [B, S, H, D], k and v [B, T, K, D] -> [B, S, H, D]; masks are aligned bottom right."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * scale
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    ahead = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None] - (k.shape[2] - q.shape[2])
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[..., None, None] * ahead.abs()
    left, right = window[0], 0 if causal else window[1]
    hidden = (ahead > right if right >= 0 else ahead != ahead) | (ahead < -left if left >= 0 else ahead != ahead)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).masked_fill(hidden, 0.0)
    return (weights @ v).transpose(1, 2)


def attention_of_documents(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *args: Any
) -> Tensor:
    """The definition for q [total, H, D], document after document."""
    out, ends = [], zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
    (q_start, k_start), *rest = ends
    for q_stop, k_stop in rest:
        parts = q[q_start:q_stop], k[k_start:k_stop], v[k_start:k_stop]
        out.append(attention_of(*(x[None] for x in parts), *args)[0])
        q_start, k_start = q_stop, k_stop
    return torch.cat([*out, torch.zeros_like(q[q_start:])])


def _gradients(call: Any, grad: Tensor, inputs: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> None:
    # Private: the body of an op runs below autograd, which is entered again here
    autograd = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with torch.enable_grad(), autograd:
        leaves = [x.detach().requires_grad_() for x in inputs]
        for result, found in zip(results, torch.autograd.grad(call(*leaves), leaves, grad), strict=True):
            result.copy_(found)


def _unread(q: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernels return besides: the logsumexp, probabilities and the state of the random numbers."""
    return q.new_zeros(shape, dtype=torch.float32), q.new_zeros(0), q.new_zeros(2, dtype=torch.int64)


@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=())
def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    window = window_size_left, window_size_right
    out = attention_of(q, k, v, softmax_scale, causal, window, softcap, alibi_slopes)
    return out.contiguous(), *_unread(q, (q.shape[0], q.shape[2], q.shape[1]))


@_flash_attn_forward.register_fake
def _(q: Tensor, *args: Any, **options: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(q), *_unread(q, (q.shape[0], q.shape[2], q.shape[1]))


@torch.library.custom_op("flash_attn::_flash_attn_varlen_forward", mutates_args=())
def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = softmax_scale, causal, (window_size_left, window_size_right), softcap, alibi_slopes
    out = attention_of_documents(q, k, v, cu_seqlens_q, cu_seqlens_k, *options)
    return out, *_unread(q, (q.shape[1], q.shape[0]))


@_flash_attn_varlen_forward.register_fake
def _(q: Tensor, *args: Any, **options: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(q), *_unread(q, (q.shape[1], q.shape[0]))


@torch.library.custom_op("flash_attn::_flash_attn_backward", mutates_args=("dq", "dk", "dv"))
def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    options = softmax_scale, causal, (window_size_left, window_size_right), softcap, alibi_slopes
    _gradients(lambda *x: attention_of(*x, *options), dout, (q, k, v), (dq, dk, dv))
    return q.new_zeros(())


@_flash_attn_backward.register_fake
def _(dout: Tensor, *args: Any, **options: Any) -> Tensor:
    return dout.new_empty(())


@torch.library.custom_op("flash_attn::_flash_attn_varlen_backward", mutates_args=("dq", "dk", "dv"))
def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    options = softmax_scale, causal, (window_size_left, window_size_right), softcap, alibi_slopes

    def call(*x: Tensor) -> Tensor:
        return attention_of_documents(*x, cu_seqlens_q, cu_seqlens_k, *options)

    _gradients(call, dout, (q, k, v), (dq, dk, dv))
    return q.new_zeros(())


@_flash_attn_varlen_backward.register_fake
def _(dout: Tensor, *args: Any, **options: Any) -> Tensor:
    return dout.new_empty(())


_forward, _varlen_forward = torch.ops.flash_attn._flash_attn_forward, torch.ops.flash_attn._flash_attn_varlen_forward
_backward, _varlen_backward = (
    torch.ops.flash_attn._flash_attn_backward,
    torch.ops.flash_attn._flash_attn_varlen_backward,
)


def _padded(*tensors: Tensor) -> list[Tensor]:
    """As the functions do for a head size that is no multiple of 8."""
    size = tensors[0].size(-1)
    return [torch.nn.functional.pad(x, [0, 8 - size % 8]) if size % 8 != 0 else x for x in tensors]


class FlashAttnQKVPackedFunc(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
                return_softmax, is_grad_enabled):  # fmt: skip
        is_grad = is_grad_enabled and qkv.requires_grad
        if softmax_scale is None:
            softmax_scale = qkv.shape[-1] ** (-0.5)
        q, k, v = qkv[:, :, 0].detach(), qkv[:, :, 1].detach(), qkv[:, :, 2].detach()
        head_size_og = q.size(3)
        q, k, v = _padded(q, k, v)
        out_padded, softmax_lse, S_dmask, rng_state = _forward(
            q, k, v, dropout_p, softmax_scale, causal=causal, window_size_left=window_size[0],
            window_size_right=window_size[1], softcap=softcap, alibi_slopes=alibi_slopes,
            return_softmax=return_softmax and dropout_p > 0,
        )  # fmt: skip
        if is_grad:
            ctx.save_for_backward(q, k, v, out_padded, softmax_lse, rng_state)
            ctx.options = dropout_p, softmax_scale, causal, *window_size, softcap, alibi_slopes, deterministic
        out = out_padded[..., :head_size_og]
        return out if not return_softmax else (out, softmax_lse, S_dmask)

    @staticmethod
    def backward(ctx, dout, *args):
        q, k, v, out, softmax_lse, rng_state = ctx.saved_tensors
        dqkv = torch.empty(q.shape[:-2] + (3, *q.shape[-2:]), dtype=q.dtype, device=q.device)
        (dout_padded,) = _padded(dout)
        _backward(
            dout_padded, q, k, v, out, softmax_lse, dqkv[:, :, 0], dqkv[:, :, 1], dqkv[:, :, 2], *ctx.options,
            rng_state=rng_state,
        )  # fmt: skip
        dqkv = dqkv[..., : dout.shape[-1]]
        return dqkv, None, None, None, None, None, None, None, None, None


class FlashAttnFunc(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
                return_softmax, is_grad_enabled):  # fmt: skip
        is_grad = is_grad_enabled and any(x.requires_grad for x in [q, k, v])
        if softmax_scale is None:
            softmax_scale = q.shape[-1] ** (-0.5)
        head_size_og = q.size(3)
        q, k, v = _padded(q, k, v)
        out_padded, softmax_lse, S_dmask, rng_state = _forward(
            q, k, v, dropout_p, softmax_scale, causal=causal, window_size_left=window_size[0],
            window_size_right=window_size[1], softcap=softcap, alibi_slopes=alibi_slopes,
            return_softmax=return_softmax and dropout_p > 0,
        )  # fmt: skip
        if is_grad:
            ctx.save_for_backward(q, k, v, out_padded, softmax_lse, rng_state)
            ctx.options = dropout_p, softmax_scale, causal, *window_size, softcap, alibi_slopes, deterministic
        out = out_padded[..., :head_size_og]
        return out if not return_softmax else (out, softmax_lse, S_dmask)

    @staticmethod
    def backward(ctx, dout, *args):
        q, k, v, out, softmax_lse, rng_state = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        (dout_padded,) = _padded(dout)
        _backward(dout_padded, q, k, v, out, softmax_lse, dq, dk, dv, *ctx.options, rng_state=rng_state)
        dq, dk, dv = (x[..., : dout.shape[-1]] for x in (dq, dk, dv))
        return dq, dk, dv, None, None, None, None, None, None, None, None, None


class FlashAttnVarlenFunc(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
                causal, window_size, softcap, alibi_slopes, deterministic, return_softmax, block_table,
                is_grad_enabled):  # fmt: skip
        is_grad = is_grad_enabled and any(x.requires_grad for x in [q, k, v])
        if softmax_scale is None:
            softmax_scale = q.shape[-1] ** (-0.5)
        head_size_og = q.size(2)
        q, k, v = _padded(q, k, v)
        out_padded, softmax_lse, S_dmask, rng_state = _varlen_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal=causal,
            window_size_left=window_size[0], window_size_right=window_size[1], softcap=softcap,
            alibi_slopes=alibi_slopes, return_softmax=return_softmax and dropout_p > 0, block_table=block_table,
        )  # fmt: skip
        if is_grad:
            ctx.save_for_backward(q, k, v, out_padded, softmax_lse, cu_seqlens_q, cu_seqlens_k, rng_state)
            ctx.options = (
                max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, *window_size, softcap, alibi_slopes,
                deterministic,
            )  # fmt: skip
        out = out_padded[..., :head_size_og]
        return out if not return_softmax else (out, softmax_lse, S_dmask)

    @staticmethod
    def backward(ctx, dout, *args):
        q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, rng_state = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        (dout_padded,) = _padded(dout)
        _varlen_backward(
            dout_padded, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, *ctx.options,
            rng_state=rng_state,
        )  # fmt: skip
        dq, dk, dv = (x[..., : dout.shape[-1]] for x in (dq, dk, dv))
        return dq, dk, dv, *(None,) * 14


def flash_attn_qkvpacked_func(qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                              alibi_slopes=None, deterministic=False, return_attn_probs=False):  # fmt: skip
    return FlashAttnQKVPackedFunc.apply(
        qkv, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        torch.is_grad_enabled(),
    )  # fmt: skip


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                    alibi_slopes=None, deterministic=False, return_attn_probs=False):  # fmt: skip
    return FlashAttnFunc.apply(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, torch.is_grad_enabled(),
    )  # fmt: skip


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                           deterministic=False, return_attn_probs=False, block_table=None):  # fmt: skip
    return FlashAttnVarlenFunc.apply(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs, block_table, torch.is_grad_enabled(),
    )  # fmt: skip
