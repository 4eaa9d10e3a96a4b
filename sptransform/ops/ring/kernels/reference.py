"""Block attention computed by its definition, which serves every case."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sptransform.ops.ring.kernels.interface import Grads, Kernel, compute_dtype

aten = torch.ops.aten


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    """[B, H, s, t]."""
    scores = grouped_rows(query, key) @ key.transpose(-2, -1) * scale
    scores = scores.view(*query.shape[:3], key.shape[2])
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    return scores if bias is None else scores + bias


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
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition. ``kept`` is dropout: a factor for each probability."""
    query, key, value = (x.to(compute_dtype(x.dtype)) for x in (query, key, value))
    scores = _scores(query, key, bias, causal, scale)
    probabilities = aten._safe_softmax(scores, -1)  # zeros where a row sees nothing
    if kept is not None:
        probabilities = probabilities * kept
    return (grouped_rows(probabilities, key) @ value).view(*query.shape[:3], -1), scores.logsumexp(-1)


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
    kept: Tensor | None = None,
) -> Grads:
    grad, query, key, value, out = (x.to(compute_dtype(x.dtype)) for x in (grad, query, key, value, out))
    probabilities = (_scores(query, key, bias, causal, scale) - lse[..., None]).exp()
    grad_rows = grouped_rows(grad, key)
    grad_probabilities = (grad_rows @ value.transpose(-2, -1)).view_as(probabilities)
    dropped = probabilities
    if kept is not None:
        dropped, grad_probabilities = probabilities * kept, grad_probabilities * kept
    # sum_j p_ij dp_ij over all keys of the row, also those of other blocks (FlashAttention, equation 4)
    whole = (grad * out).sum(-1, keepdim=True)
    grad_scores = grouped_rows(probabilities * (grad_probabilities - whole) * scale, key)
    grad_query = (grad_scores @ key).view_as(query)
    grad_key = grad_scores.transpose(-2, -1) @ grouped_rows(query, key)
    grad_value = grouped_rows(dropped, key).transpose(-2, -1) @ grad_rows
    return grad_query, grad_key, grad_value


OPEN = Kernel("PyTorch reference", lambda case: True, _open, _open_backward)
