"""Stand-ins, on a CPU, of attention kernels that run on GPUs only.

There are torch's own flash attention, whose ops get bodies for the CPU here, and the functions of flash-attn 2.8 that
we call. Schemas and argument names are theirs. What is behind them is ours: it computes in the open what they define,
with their windows, which are aligned to the last query and the last key, and with their habits: a window no narrower
than the keys is none, and ``lse`` is ``+inf`` for a row that sees nothing. Packed documents are computed one by one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sptransform.ops.ring.kernels import cuda
from sptransform.ops.ring.kernels.interface import Case, compute_dtype


def seen(num_queries: int, num_keys: int, causal: bool, left: int, right: int) -> Tensor:
    """[queries, keys]: what flash-attn shows; -1 is no limit."""
    left, right = (-1 if limit >= num_keys else limit for limit in (left, right))
    if causal:
        right = 0
    ahead = torch.arange(num_keys) - torch.arange(num_queries)[:, None] - (num_keys - num_queries)
    return ((ahead >= -left) | (left < 0)) & ((ahead <= right) | (right < 0))


def _scores(query: Tensor, key: Tensor, scale: float, softcap: float) -> Tensor:
    scores = query @ key.mT * scale
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, window: tuple[int, int], softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """query [B, s, H, D], key [B, t, K, D] -> out [B, s, H, D], lse [B, H, s]."""
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    q, k, v = (x.transpose(1, 2).to(compute_dtype(x.dtype)) for x in (query, key, value))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    shown = seen(q.shape[2], k.shape[2], causal, *window)
    scores = _scores(q, k, scale, softcap).masked_fill(~shown, -torch.inf)
    out = torch.ops.aten._safe_softmax(scores, -1) @ v
    lse = scores.logsumexp(-1).masked_fill(~shown.any(-1), torch.inf)
    return out.to(query.dtype).transpose(1, 2).contiguous(), lse


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    window: tuple[int, int],
    softcap: float = 0.0,
) -> list[Tensor]:
    """The gradients of query, key and value where ``out`` and ``lse`` are those over more keys."""
    assert lse.is_contiguous() and all(x.stride(-1) == 1 for x in (grad, query, key, value, out))
    g, q, k, v, o = (x.transpose(1, 2).to(compute_dtype(x.dtype)) for x in (grad, query, key, value, out))
    times = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(times, 1) for x in (k, v))
    scores = _scores(q, k, scale, softcap)
    shown = seen(q.shape[2], k.shape[2], causal, *window)
    weights = (scores.masked_fill(~shown, -torch.inf) - lse[..., None]).exp()
    of_scores = weights * (g @ v.mT - (g * o).sum(-1, keepdim=True)) * scale
    if softcap:
        of_scores = of_scores * (1 - (scores / softcap).square())
    grads = [of_scores @ k, of_scores.mT @ q, weights.mT @ g]
    grads = [grads[0], *(x.unflatten(1, (-1, times)).sum(2) for x in grads[1:])]
    return [x.to(query.dtype).transpose(1, 2).contiguous() for x in grads]


def _documents(ends: Tensor, key_ends: Tensor) -> Iterator[tuple[slice, slice]]:
    assert ends.dtype == key_ends.dtype == torch.int32 and ends[0] == key_ends[0] == 0
    (start, key_start), *rest = zip(ends.tolist(), key_ends.tolist(), strict=True)
    for stop, key_stop in rest:
        yield slice(start, stop), slice(key_start, key_stop)
        start, key_start = stop, key_stop


def forward_of_documents(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, key_ends: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    """query [n, H, D], key [m, K, D] -> out [n, H, D], lse [H, n]."""
    out, lse = torch.full_like(query, torch.nan), query.new_full(
        (query.shape[1], query.shape[0]), torch.nan, dtype=compute_dtype(query.dtype)
    )  # fmt: skip
    for rows, keys in _documents(ends, key_ends):
        out[rows], lse[:, rows] = (x[0] for x in forward(query[None, rows], *(x[None, keys] for x in (key, value)),
                                                         *options))  # fmt: skip
    return out, lse


def backward_of_documents(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, ends: Tensor, key_ends: Tensor,
    *options: Any,
) -> list[Tensor]:  # fmt: skip
    grads = [torch.full_like(x, torch.nan) for x in (query, key, value)]
    for rows, keys in _documents(ends, key_ends):
        found = backward(
            grad[None, rows], query[None, rows], key[None, keys], value[None, keys], out[None, rows],
            lse[None, :, rows].contiguous(), *options,
        )  # fmt: skip
        for total, part, at in zip(grads, found, (rows, keys, keys), strict=True):
            total[at] = part[0]
    return grads


class Calls(list[tuple[str, bool, tuple[int, int]]]):
    """Which functions were called, causal or not, with which window."""


def _limits(window_size_left: int | None, window_size_right: int | None) -> tuple[int, int]:
    return tuple(-1 if x is None else x for x in (window_size_left, window_size_right))


@contextmanager
def torch_flash_on_cpu() -> Iterator[Calls]:
    """Bodies for the CPU of torch's flash attention."""
    calls = Calls()

    def flash_forward(q, k, v, ends, key_ends, max_q, max_k, dropout_p, causal, debug, *, scale=None,
                      window_size_left=None, window_size_right=None, **options):  # fmt: skip
        assert not (dropout_p or debug or any(x is not None for x in options.values()))
        window = _limits(window_size_left, window_size_right)
        calls.append(("_flash_attention_forward", causal, window))
        if ends is None:
            out, lse = forward(q, k, v, scale, causal, window)
        else:
            assert (max_q, max_k) == (ends.diff().max(), key_ends.diff().max())
            out, lse = forward_of_documents(q, k, v, ends, key_ends, scale, causal, window)
        return out, lse, *(q.new_empty(0) for _ in range(3))

    def flash_backward(grad, q, k, v, out, lse, ends, key_ends, max_q, max_k, dropout_p, causal, seed, offset, *,
                       scale=None, window_size_left=None, window_size_right=None):  # fmt: skip
        assert not dropout_p
        window = _limits(window_size_left, window_size_right)
        calls.append(("_flash_attention_backward", causal, window))
        if ends is None:
            return tuple(backward(grad, q, k, v, out, lse, scale, causal, window))
        return tuple(backward_of_documents(grad, q, k, v, out, lse, ends, key_ends, scale, causal, window))

    def attention_forward(q, k, v, dropout_p=0.0, causal=False, debug=False, *, scale=None):
        assert not (dropout_p or debug or (causal and q.shape[2] != k.shape[2]))
        calls.append(("_scaled_dot_product_flash_attention", causal, (-1, -1)))
        out, lse = forward(*(x.transpose(1, 2) for x in (q, k, v)), scale, causal, (-1, -1))
        return out.transpose(1, 2), lse, None, None, q.shape[2], k.shape[2], *(q.new_empty(0) for _ in range(3))

    def attention_backward(grad, q, k, v, out, lse, ends, key_ends, max_q, max_k, dropout_p, causal, seed, offset, *,
                           scale=None):  # fmt: skip
        assert not dropout_p
        calls.append(("_scaled_dot_product_flash_attention_backward", causal, (-1, -1)))
        xs = (x.transpose(1, 2) for x in (grad, q, k, v, out))
        return tuple(x.transpose(1, 2) for x in backward(*xs, lse, scale, causal, (-1, -1)))

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", flash_forward, "CPU")
        library.impl("_flash_attention_backward", flash_backward, "CPU")
        library.impl("_scaled_dot_product_flash_attention", attention_forward, "CPU")
        library.impl("_scaled_dot_product_flash_attention_backward", attention_backward, "CPU")
        yield calls


def flash_attn_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """A module ``flash_attn`` with the functions of flash-attn 2.8 that are called; its tensors are [B, s, H, D]."""
    calls = Calls()

    def _flash_attn_forward(q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
                            alibi_slopes, return_softmax):  # fmt: skip
        assert not (dropout_p or alibi_slopes or return_softmax)
        calls.append(("_flash_attn_forward", causal, (window_size_left, window_size_right)))
        out, lse = forward(q, k, v, softmax_scale, causal, calls[-1][2], softcap)
        return out, lse, None, None

    def _flash_attn_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
                             window_size_left, window_size_right, softcap, alibi_slopes, deterministic):  # fmt: skip
        assert not (dropout_p or alibi_slopes or deterministic)
        calls.append(("_flash_attn_backward", causal, (window_size_left, window_size_right)))
        grads = backward(dout, q, k, v, out, softmax_lse, softmax_scale, causal, calls[-1][2], softcap)
        for x, grad in zip((dq, dk, dv), grads, strict=True):
            x.copy_(grad)

    def _flash_attn_varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                                   softmax_scale, causal, window_size_left=-1, window_size_right=-1, softcap=0.0,
                                   alibi_slopes=None, return_softmax=False, block_table=None, leftpad_k=None,
                                   seqused_k=None, zero_tensors=False):  # fmt: skip
        ends = cu_seqlens_q, cu_seqlens_k
        assert (max_seqlen_q, max_seqlen_k) == tuple(x.diff().max() for x in ends) and not (dropout_p or alibi_slopes)
        calls.append(("_flash_attn_varlen_forward", causal, (window_size_left, window_size_right)))
        return *forward_of_documents(q, k, v, *ends, softmax_scale, causal, calls[-1][2], softcap), None, None

    def _flash_attn_varlen_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k,
                                    max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left,
                                    window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
                                    zero_tensors=False):  # fmt: skip
        ends = cu_seqlens_q, cu_seqlens_k
        assert (max_seqlen_q, max_seqlen_k) == tuple(x.diff().max() for x in ends) and not (dropout_p or alibi_slopes)
        calls.append(("_flash_attn_varlen_backward", causal, (window_size_left, window_size_right)))
        options = softmax_scale, causal, calls[-1][2], softcap
        grads = backward_of_documents(dout, q, k, v, out, softmax_lse, *ends, *options)
        for x, grad in zip((dq, dk, dv), grads, strict=True):
            x.copy_(grad)

    functions = SimpleNamespace(
        _flash_attn_forward=_flash_attn_forward,
        _flash_attn_backward=_flash_attn_backward,
        _flash_attn_varlen_forward=_flash_attn_varlen_forward,
        _flash_attn_varlen_backward=_flash_attn_varlen_backward,
    )
    monkeypatch.setitem(sys.modules, "flash_attn", functions)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", functions)
    return calls


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, *, flash_attn: bool = False) -> None:
    """Choose kernels for tensors of the CPU as if they were of a GPU, those of 16 bits for float64 too."""
    of = Case.of
    monkeypatch.setattr(Case, "of", staticmethod(lambda *args, **options: replace(of(*args, **options), device="cuda")))
    monkeypatch.setattr(cuda, "_SIXTEEN_BITS", (torch.float16, torch.bfloat16, torch.float64))
    monkeypatch.setattr(cuda, "_capability", lambda: (9, 0))
    monkeypatch.setattr(cuda, "_prefers_cudnn", lambda: False)
    monkeypatch.setattr(cuda, "has_flash_attn", lambda: flash_attn)


@contextmanager
def on_cpu(kernel: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """What is called of "flash-attn" or "CUDA flash", which is then the kernel that is chosen."""
    pretend_cuda(monkeypatch, flash_attn=kernel == "flash-attn")
    if kernel == "flash-attn":
        yield flash_attn_on_cpu(monkeypatch)
    else:
        with torch_flash_on_cpu() as calls:
            yield calls
