"""The CUDA attention kernels, with the signature of :mod:`sptransform.ops.ring.kernels.interface`.

None of them gets dropout: each would draw its own random numbers, the same ones on ranks with equal seeds.
"""

from __future__ import annotations

import math
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor
from torch.nn import functional

from sptransform.ops.ring.kernels.interface import Case, Grads, aligned_rows

aten = torch.ops.aten


_SIXTEEN_BITS = (torch.float16, torch.bfloat16)


def is_plain(case: Case) -> bool:
    """What the flash kernels and cuDNN require: a 16-bit dtype, head sizes in multiples of 16 bytes, no mask.

    Softcap and windows apart, which not all of them have.
    """
    sizes = (case.head_dim, case.value_dim)
    fits = case.dtype in _SIXTEEN_BITS and all(size % 8 == 0 and 0 < size <= 256 for size in sizes)
    return case.device == "cuda" and fits and not case.masked and not case.explicit and _capability() >= (8, 0)


def is_for_flash(case: Case) -> bool:
    """The backward has no room for heads of 193 to 224 on GPUs with little shared memory."""
    is_small = (8, 6) <= _capability() < (9, 0) or _capability() >= (12, 0)
    fits = case.head_dim == case.value_dim and not (is_small and 192 < case.head_dim <= 224)
    return is_plain(case) and fits and not case.softcap and torch.backends.cuda.flash_sdp_enabled()


def is_for_cudnn(case: Case) -> bool:
    """Where it is faster than the flash kernels, or values have another head size, which those do not take.

    It is compiled for each shape, in a part of a second, so not for shapes that come from data. Its backward adds in
    any order.
    """
    sizes = case.head_dim, case.value_dim
    fits = max(sizes) <= 128 or (sizes == (192, 128) and _is_hopper())
    is_better = case.head_dim != case.value_dim or (_prefers_cudnn() and not case.varying)
    is_allowed = not torch.are_deterministic_algorithms_enabled() and torch.backends.cuda.cudnn_sdp_enabled()
    refused = case.softcap or case.windowed or case.one_key
    return is_plain(case) and fits and is_better and is_allowed and not refused


def is_efficient(case: Case) -> bool:
    unit = 16 // case.dtype.itemsize
    fits = case.dtype in (*_SIXTEEN_BITS, torch.float32) and case.head_dim % unit == 0 == case.value_dim % unit
    refused = case.explicit or case.softcap or case.windowed
    return case.device == "cuda" and fits and not refused and torch.backends.cuda.mem_efficient_sdp_enabled()


def _is_hopper() -> bool:
    """Or Blackwell of data centers."""
    return _capability()[0] in (9, 10)


@cache
def _prefers_cudnn() -> bool:
    """Where torch's own attention takes it first: before this version it is wrong for some lengths."""
    return _is_hopper() and (torch.backends.cudnn.version() or 92000) > 91500


@cache
def _capability() -> tuple[int, int]:
    # without a GPU all CUDA tensors are fake, and only the name of their kernel is needed
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)


@cache
def has_flash_attn() -> bool:
    """Whether flash-attn is installed in a version whose functions take the arguments passed here."""
    try:
        major, minor = version("flash-attn").split(".")[:2]
    except PackageNotFoundError:
        return False
    return (2, 7) <= (int(major), int(minor)) < (3, 0)


def window(query: Tensor, key: Tensor, causal: bool, sliding: bool) -> dict[str, int]:
    """The window arguments of flash-attn, -1 being no limit; tensors are [B, H, s, D].

    Query n sees the keys ``n + t - s - left`` to ``n + t - s + right``.
    """
    left = key.shape[2] - query.shape[2] if sliding else -1
    return {"window_size_left": left, "window_size_right": 0 if causal else -1}


def flash_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: None,
    causal: bool,
    scale: float,
    softcap: float = 0.0,
    sliding: bool = False,
) -> tuple[Tensor, Tensor]:
    """The package's tensors are [B, s, H, D]."""
    from flash_attn.flash_attn_interface import _flash_attn_forward

    limits = window(query, key, causal, sliding)
    query, key, value = (aligned_rows(x).transpose(1, 2) for x in (query, key, value))
    out, lse, *_ = _flash_attn_forward(
        query,
        key,
        value,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=causal,
        **limits,
        softcap=softcap,
        alibi_slopes=None,
        return_softmax=False,
    )
    return out.transpose(1, 2), lse


def flash_attn_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    softcap: float = 0.0,
    sliding: bool = False,
) -> Grads:
    from flash_attn.flash_attn_interface import _flash_attn_backward

    limits = window(query, key, causal, sliding)
    grad, query, key, value, out = (aligned_rows(x).transpose(1, 2) for x in (grad, query, key, value, out))
    grads = [torch.empty_like(x) for x in (query, key, value)]
    _flash_attn_backward(
        grad,
        query,
        key,
        value,
        out,
        lse.contiguous(),
        *grads,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=causal,
        **limits,
        softcap=softcap,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    grad_query, grad_key, grad_value = (x.transpose(1, 2) for x in grads)
    return grad_query, grad_key, grad_value


def flash(
    query: Tensor, key: Tensor, value: Tensor, bias: None, causal: bool, scale: float, sliding: bool = False
) -> tuple[Tensor, Tensor]:
    """Also runs FlashAttention 3 or 4, if ``torch.nn.attention.activate_flash_attention_impl`` selected it."""
    query, key, value = (aligned_rows(x) for x in (query, key, value))
    sizes = query.shape[2], key.shape[2]
    if _is_window(sizes, causal, sliding):
        limits = window(query, key, causal, sliding)
        xs = (x.transpose(1, 2) for x in (query, key, value))
        out, lse, *_ = aten._flash_attention_forward(
            *xs, None, None, *sizes, 0.0, causal, False, scale=scale, **limits
        )
        return out.transpose(1, 2), lse
    out, lse, *_ = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)
    return out, lse


def flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    sliding: bool = False,
) -> Grads:
    grad, query, key, value, out = (aligned_rows(x) for x in (grad, query, key, value, out))
    lse, sizes = lse.contiguous(), (query.shape[2], key.shape[2])
    if _is_window(sizes, causal, sliding):
        limits = window(query, key, causal, sliding)
        xs = (x.transpose(1, 2) for x in (grad, query, key, value, out))
        grads = aten._flash_attention_backward(
            *xs, lse, None, None, *sizes, 0.0, causal, *_no_random_state(query),
            scale=scale, **limits,
        )  # fmt: skip
        grad_query, grad_key, grad_value = (x.transpose(1, 2) for x in grads)
        return grad_query, grad_key, grad_value
    return aten._scaled_dot_product_flash_attention_backward(
        grad, query, key, value, out, lse, None, None, *sizes, 0.0, causal, *_no_random_state(query), scale=scale
    )


def _is_window(sizes: tuple[int, int], causal: bool, sliding: bool) -> bool:
    """Whether torch's flash attention, in which causality has as many keys as queries, cannot say it."""
    return sliding or (causal and sizes[0] != sizes[1])


def cudnn(query: Tensor, key: Tensor, value: Tensor, bias: None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The kernel's lse has one more dimension. The head size of values may differ from that of keys."""
    query, key, value = (aligned_rows(x) for x in (query, key, value))
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, False, scale=scale
    )
    return out, lse.view(query.shape[:3])


def cudnn_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> Grads:
    grad, query, key, value, out = (aligned_rows(x) for x in (grad, query, key, value, out))
    seed, offset = _no_random_state(query)
    sizes = query.shape[2], key.shape[2]
    return aten._scaled_dot_product_cudnn_attention_backward(
        grad, query, key, value, out, lse.unsqueeze(-1).contiguous(), seed, offset, None, None, None, *sizes, 0.0,
        causal, scale=scale,
    )  # fmt: skip


def efficient(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The kernel pads lse to full tiles of rows, and may give NaN for a row that sees nothing."""
    query, key, value = (aligned_rows(x) for x in (query, key, value))
    bias = _aligned(bias, query, key)
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, 0.0, causal, scale=scale)
    lse = lse.narrow(-1, 0, query.shape[2])
    if bias is None:
        return out, lse
    hidden = bias.amax(-1) == -math.inf
    return out.masked_fill(hidden.unsqueeze(-1), 0), lse.masked_fill(hidden, 0)


def efficient_backward(
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
    grad, query, key, value = (aligned_rows(x) for x in (grad, query, key, value))
    # of out, the kernel for 16 bits reads no stride but the batch's: it takes [B, s, H, E] for granted
    if not out.transpose(1, 2).is_contiguous():
        out = out.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
    lse = functional.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf)
    seed, offset = _no_random_state(query)
    grads = aten._scaled_dot_product_efficient_attention_backward(
        grad, query, key, value, _aligned(bias, query, key), out, lse, seed, offset, 0.0, [True, True, True, False],
        causal, scale=scale,
    )  # fmt: skip
    return grads[:3]


def _aligned(bias: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The bias expanded to all heads, with rows that start at multiples of 16 entries."""
    if bias is None:
        return None
    size = key.shape[2]
    bias = bias.to(query.dtype).expand(*bias.shape[:-1], size)
    padded = functional.pad(bias, (0, -size % 16)).narrow(-1, 0, size)
    return padded.expand(*query.shape[:3], size)


def _no_random_state(query: Tensor) -> tuple[Tensor, Tensor]:
    """The random state arguments of a backward without dropout, which does not read them."""
    empty = torch.empty((), dtype=torch.int64, device=query.device)
    return empty, empty
