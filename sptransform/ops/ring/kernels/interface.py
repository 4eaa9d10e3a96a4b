"""Attention of one block of queries and keys: the signature that every kernel has.

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
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Grads = tuple[Tensor, Tensor, Tensor]


def rows_in_memory(x: Tensor) -> Tensor:
    """``x``, copied where a row does not lie in one piece: kernels take that for granted, and do not check it."""
    return x if x.stride(-1) == 1 else x.contiguous()


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
