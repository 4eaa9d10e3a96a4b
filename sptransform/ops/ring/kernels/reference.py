"""Block attention computed by its definition, which serves every case.

It computes tiles of rows, so that no tensor has all queries and all keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sptransform.ops.ring.kernels.interface import Grads, Kernel, compute_dtype
from sptransform.ops.ring.plan import TILE

aten = torch.ops.aten

Kept = Callable[[Tensor, int], Tensor]


def _tiles(query: Tensor, key: Tensor, causal: bool, sliding: bool) -> Iterator[tuple[slice, slice]]:
    """Rows, and the keys that some of them see."""
    more = key.shape[2] - query.shape[2]
    for start in range(0, query.shape[2], TILE):
        stop = min(start + TILE, query.shape[2])
        yield slice(start, stop), slice(start if sliding else 0, stop + more if causal else key.shape[2])


def _capped(query: Tensor, key: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor | None]:
    """The scores [B, H, s, t] before any mask, and what a softcap multiplies their gradient by."""
    scores = (grouped_rows(query, key) @ key.transpose(-2, -1) * scale).view(*query.shape[:3], key.shape[2])
    if not softcap:
        return scores, None
    bounded = torch.tanh(scores / softcap)
    return bounded * softcap, 1 - bounded.square()


def _masked(scores: Tensor, bias: Tensor | None, causal: bool, sliding: bool, start: int) -> Tensor:
    """``scores`` of the rows from ``start`` on. The last of them sees the last key, the first the first key."""
    if causal:
        rows, keys = scores.shape[-2:]
        scores = scores.masked_fill(_everywhere(scores).triu(keys - rows + 1), -math.inf)
    if sliding:
        scores = scores.masked_fill(_everywhere(scores).tril(-1), -math.inf)
    if bias is None:
        return scores
    return scores + (bias if bias.shape[2] == 1 else bias.narrow(2, start, scores.shape[2]))


def _everywhere(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)


def grouped_rows(x: Tensor, key: Tensor) -> Tensor:
    """[B, H, s, D] as [B, K, H/K * s, D]: the rows that read one key head are rows of one matrix."""
    return x.reshape(x.shape[0], key.shape[1], -1, x.shape[-1])


def _open(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float = 0.0,
    sliding: bool = False,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition."""
    query, key, value = (x.to(compute_dtype(x.dtype)) for x in (query, key, value))
    outs, lses = [], []
    for rows, keys in _tiles(query, key, causal, sliding):
        scores, _ = _capped(query[:, :, rows], key[:, :, keys], scale, softcap)
        scores = _masked(scores, bias, causal, sliding, rows.start)
        probabilities = aten._safe_softmax(scores, -1)  # zeros where a row sees nothing
        if kept is not None:
            probabilities = probabilities * kept(probabilities, rows.start)
        outs.append((grouped_rows(probabilities, key) @ value[:, :, keys]).view(*scores.shape[:3], -1))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _open_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    softcap: float = 0.0,
    sliding: bool = False,
    kept: Kept | None = None,
    explicit: bool = False,
    grad_bias: Tensor | None = None,
) -> Grads:
    """``grad_bias``: zeros in the shape of the bias, to which its gradient is added."""
    grad, query, key, value, out = (x.to(compute_dtype(x.dtype)) for x in (grad, query, key, value, out))
    # sum_j p_ij dp_ij over all keys of the row, also those of other blocks (FlashAttention, equation 4)
    whole = (grad * out).sum(-1, keepdim=True)
    grads_query, grad_key, grad_value = [], torch.zeros_like(key), torch.zeros_like(value)
    for rows, keys in _tiles(query, key, causal, sliding):
        queries, seen = query[:, :, rows], key[:, :, keys]
        scores, slope = _capped(queries, seen, scale, softcap)
        scores = _masked(scores, bias, causal, sliding, rows.start)
        if explicit:
            probabilities = aten._safe_softmax(scores, -1)
        else:
            probabilities = (scores - lse[:, :, rows, None]).exp()
        grad_rows = grouped_rows(grad[:, :, rows], key)
        grad_probabilities = (grad_rows @ value[:, :, keys].transpose(-2, -1)).view_as(probabilities)
        dropped = probabilities
        if kept is not None:
            factors = kept(probabilities, rows.start)
            dropped, grad_probabilities = probabilities * factors, grad_probabilities * factors
        grad_scores = probabilities * (grad_probabilities - whole[:, :, rows])
        if grad_bias is not None:
            of_rows = grad_bias if grad_bias.shape[2] == 1 else grad_bias[:, :, rows]
            of_rows += grad_scores.sum_to_size(of_rows.shape)
        grad_scores = grad_scores * scale
        if slope is not None:
            grad_scores = grad_scores * slope
        grad_scores = grouped_rows(grad_scores, key)
        grads_query.append((grad_scores @ seen).view_as(queries))
        grad_key[:, :, keys] += grad_scores.transpose(-2, -1) @ grouped_rows(queries, key)
        grad_value[:, :, keys] += grouped_rows(dropped, key).transpose(-2, -1) @ grad_rows
    return torch.cat(grads_query, 2), grad_key, grad_value


OPEN = Kernel("PyTorch reference", lambda case: True, _open, _open_backward, widens=True)
