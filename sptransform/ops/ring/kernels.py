"""Attention of one block of queries and keys, by whichever kernel serves it best; all speak one language.

forward:  (query, key, value, bias, causal, scale) -> (out, lse)
backward: (grad, query, key, value, bias, out, lse, causal, scale) -> (grads of query, key, value)

- query [B, H, s, D], key [B, K, t, D], value [B, K, t, E] with H a multiple of K and nothing empty;
  query head i reads key head ``i // (H // K)``.
- bias: None, or what is added to the scores, ``-inf`` where a key is hidden; 4 dimensions that broadcast.
- causal: only without bias and for s == t.
- lse [B, H, s]: logarithm of the sum of the exponentials of a row. Where a row sees nothing ``out`` is zero or
  any finite number, ``lse`` any number.
- backward takes ``out`` and ``lse`` of all keys, of which this block may be a part: the probabilities are
  ``exp(score - lse)`` (Dao et al., FlashAttention, arXiv 2205.14135, appendix B.2).

``TABLE`` is in order of preference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sptransform.ops.ring import cuda_kernels
from sptransform.ops.ring.cuda_kernels import Grads, rows_in_memory

aten = torch.ops.aten


@dataclass(frozen=True)
class Case:
    """What the choice of a kernel depends on."""

    device: str
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    masked: bool
    dropout: bool

    @staticmethod
    def of(query: Tensor, value: Tensor, *, masked: bool, dropout_p: float) -> Case:
        return Case(query.device.type, query.dtype, query.shape[-1], value.shape[-1], masked, dropout_p > 0)


@dataclass(frozen=True)
class Kernel:
    """``grouped`` is whether it reads K < H key heads as they are; if not, it gets them repeated."""

    name: str
    serves: Callable[[Case], bool]
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Grads]
    grouped: bool = True


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which results of blocks are put together."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cpu_flash(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Sixteen-bit inputs are computed in float32: results rounded once a block are worse than one device's."""
    dtype = compute_dtype(query.dtype)
    query, key, value = (rows_in_memory(x).to(dtype) for x in (query, key, value))
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, attn_mask=bias, scale=scale)


def _cpu_flash_backward(
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
    """The definition. ``kept`` multiplies the probabilities: dropout."""
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
    # sum_j p_ij dp_ij of the whole row, of which this block may be a part (FlashAttention, equation 4)
    whole = (grad * out).sum(-1, keepdim=True)
    grad_scores = grouped_rows(probabilities * (grad_probabilities - whole) * scale, key)
    grad_query = (grad_scores @ key).view_as(query)
    grad_key = grad_scores.transpose(-2, -1) @ grouped_rows(query, key)
    grad_value = grouped_rows(dropped, key).transpose(-2, -1) @ grad_rows
    return grad_query, grad_key, grad_value


OPEN = Kernel("PyTorch reference", lambda case: True, _open, _open_backward)

TABLE = (
    Kernel(
        "CPU flash",
        lambda case: case.device == "cpu" and case.head_dim == case.value_dim and not case.dropout,
        _cpu_flash,
        _cpu_flash_backward,
    ),
    Kernel(
        "flash-attn",
        lambda case: cuda_kernels.is_plain(case) and cuda_kernels.has_flash_attn() and case.head_dim == case.value_dim,
        cuda_kernels.flash_attn,
        cuda_kernels.flash_attn_backward,
    ),
    Kernel(
        "CUDA flash",
        lambda case: cuda_kernels.is_plain(case) and case.head_dim == case.value_dim,
        cuda_kernels.flash,
        cuda_kernels.flash_backward,
    ),
    Kernel(
        "cuDNN",
        lambda case: cuda_kernels.is_plain(case) and case.head_dim <= 192 and case.value_dim <= 128,
        cuda_kernels.cudnn,
        cuda_kernels.cudnn_backward,
        grouped=False,
    ),
    Kernel(
        "CUDA memory-efficient",
        cuda_kernels.is_efficient,
        cuda_kernels.efficient,
        cuda_kernels.efficient_backward,
        grouped=False,
    ),
    OPEN,
)


def choose(case: Case) -> Kernel:
    return next(kernel for kernel in TABLE if kernel.serves(case))


def kernel_name(query: Tensor, value: Tensor, *, masked: bool = False, dropout_p: float = 0.0) -> str:
    """Which kernel computes the blocks of such an attention; tensors may be fake.

    ``masked`` are calls with a mask: all of a mask program's, and those on the edge of a sliding window.
    """
    return choose(Case.of(query, value, masked=masked, dropout_p=dropout_p)).name
