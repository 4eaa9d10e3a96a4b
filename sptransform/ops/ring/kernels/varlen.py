"""Attention of many pieces of sequences, such as packed documents, in one call of a CUDA kernel.

The signatures are those of :mod:`sptransform.ops.ring.kernels.interface`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from sptransform.ops.ring.kernels.interface import Grads, Pieces, aligned_rows, compute_dtype
from sptransform.sharding.intervals import adjoined

aten = torch.ops.aten


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Pieces,
    keys: Pieces,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    xs = rows_of(query, queries), rows_of(key, keys), rows_of(value, keys)
    packed = _packed(queries, keys, query.device)
    out, lse, *_ = aten._flash_attention_forward(*xs, *packed, 0.0, causal, False, scale=scale)
    return out, _where_seen(lse)


def flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    queries: Pieces,
    keys: Pieces,
    causal: bool,
    scale: float,
) -> Grads:
    xs = (rows_of(x, at) for x, at in ((grad, queries), (query, queries), (key, keys), (value, keys), (out, queries)))
    no_random_state = torch.empty((), dtype=torch.int64, device=query.device)
    packed = _lse_of(lse, queries, query.dtype), *_packed(queries, keys, query.device)
    return aten._flash_attention_backward(
        *xs, *packed, 0.0, causal, no_random_state, no_random_state, scale=scale
    )


def flash_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Pieces,
    keys: Pieces,
    causal: bool,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    xs = rows_of(query, queries), rows_of(key, keys), rows_of(value, keys)
    out, lse, *_ = _flash_attn_varlen_forward(
        *xs,
        *_packed(queries, keys, query.device),
        dropout_p=0.0,
        softmax_scale=scale,
        causal=causal,
        window_size_left=-1,
        window_size_right=0 if causal else -1,
        softcap=softcap,
        alibi_slopes=None,
        return_softmax=False,
    )
    return out, _where_seen(lse)


def flash_attn_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    queries: Pieces,
    keys: Pieces,
    causal: bool,
    scale: float,
    softcap: float = 0.0,
) -> Grads:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    xs = rows_of(query, queries), rows_of(key, keys), rows_of(value, keys)
    grad_query, grad_key, grad_value = (torch.empty_like(x) for x in xs)
    _flash_attn_varlen_backward(
        rows_of(grad, queries),
        *xs,
        rows_of(out, queries),
        _lse_of(lse, queries, query.dtype),
        grad_query,
        grad_key,
        grad_value,
        *_packed(queries, keys, query.device),
        dropout_p=0.0,
        softmax_scale=scale,
        causal=causal,
        window_size_left=-1,
        window_size_right=0 if causal else -1,
        softcap=softcap,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return grad_query, grad_key, grad_value


def rows_of(x: Tensor, pieces: Pieces) -> Tensor:
    """The rows of x [B, H, s, D] in ``pieces``, [n, H, D]; a view if they adjoin."""
    return _picked(aligned_rows(x).transpose(1, 2).flatten(0, 1), pieces, dim=0)


def _lse_of(lse: Tensor, pieces: Pieces, dtype: torch.dtype) -> Tensor:
    """The rows of lse [B, H, s] in ``pieces``, [H, n], for queries of ``dtype``."""
    found = _picked(lse.transpose(0, 1).flatten(1), pieces, dim=1)
    # makes the probabilities of a row that sees nothing exp(-inf - 0) = 0
    return found.masked_fill(found == -math.inf, 0).to(compute_dtype(dtype)).contiguous()


def _picked(x: Tensor, pieces: Pieces, *, dim: int) -> Tensor:
    parts = [x.narrow(dim, start, stop - start) for start, stop in adjoined(pieces)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _packed(queries: Pieces, keys: Pieces, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """Where the pieces end in their rows, and the lengths of the longest ones."""
    sizes = [[stop - start for start, stop in pieces] for pieces in (queries, keys)]
    if len(queries) != len(keys) or min(map(min, sizes)) <= 0:
        raise ValueError(f"queries {list(queries)} and keys {list(keys)} are not pairs of pieces with rows")
    return _ends(sizes[0], device), _ends(sizes[1], device), max(sizes[0]), max(sizes[1])


def _ends(sizes: Sequence[int], device: torch.device) -> Tensor:
    # copied without waiting for the device, as torch.tensor(.., device=device) would
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32).to(device, non_blocking=True)


def _where_seen(lse: Tensor) -> Tensor:
    # where a row sees nothing, out is 0, and lse +inf, or -inf in later kernels
    return lse.masked_fill(lse == math.inf, -math.inf)
