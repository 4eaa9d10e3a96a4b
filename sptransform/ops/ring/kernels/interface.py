"""Attention of one block of queries and keys: the signature of every kernel.

forward:  (query, key, value, bias, causal, scale) -> (out, lse)
backward: (grad, query, key, value, bias, out, lse, causal, scale) -> (grads of query, key, value)

- query [B, H, s, D], key [B, K, t, D], value [B, K, t, E] with H a multiple of K and nothing empty;
  query head i reads key head ``i // (H // K)``.
- bias: None, or a tensor added to the scores, ``-inf`` where a key is hidden; 4 dimensions that broadcast.
- causal: query n sees the keys up to number ``t - s + n``; only without bias and for s <= t.
- sliding, for kernels that serve windows: a keyword argument, given if query n sees the keys from number n on; only
  without bias and for s <= t. Other kernels get causal for s == t only.
- softcap, for kernels that serve it: a keyword argument, given if there is one. The scaled scores are
  ``softcap * tanh(score / softcap)`` before the bias.
- kept, for kernels that serve dropout: a keyword argument, given if there is dropout. ``kept(probabilities, start)``
  are the factors of rows from ``start`` on, the same at every call.
- explicit, for kernels that serve it: a keyword argument of backward, given if the keys are all that the queries see.
  The probabilities are then the softmax of the scores, and lse is not read.
- lse [B, H, s]: logarithm of the sum of the exponentials of a row. Where a row sees nothing, ``out`` is any finite
  number and ``lse`` any number.
- backward takes ``out`` and ``lse`` over all keys, also those of other blocks: the probabilities are
  ``exp(score - lse)`` (Dao et al., FlashAttention, arXiv 2205.14135, appendix B.2).

Attention of pieces of sequences, for kernels that have it; the n-th piece of the queries sees the n-th of the keys:

forward:  (query, key, value, queries, keys, causal, scale) -> (out, lse)
backward: (grad, query, key, value, out, lse, queries, keys, causal, scale) -> (grads of query, key, value)

- queries, keys: (start, stop) of each piece, none of them empty. Rows are numbered through the batch: those of
  sequence b begin at ``b * s``, or ``b * t``.
- out [n, H, E], lse [H, n] and the gradients [n, H, D], [m, K, D] and [m, K, E] have the rows of the pieces, in order;
  the other tensors those of whole sequences, as above.
- causal: query i of s in a piece sees the keys up to number ``i + t - s`` of t. softcap as above.
- Where a row sees nothing, forward gives 0 and an lse of ``-inf``, and backward takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Grads = tuple[Tensor, Tensor, Tensor]
Pieces = Sequence[tuple[int, int]]


def rows_in_memory(x: Tensor) -> Tensor:
    """``x``, copied if its rows are not contiguous: kernels assume that they are, without a check."""
    return x if x.stride(-1) == 1 else x.contiguous()


def aligned_rows(x: Tensor) -> Tensor:
    """``x``, copied if its rows are not contiguous, or do not begin at multiples of 16 bytes.

    GPU kernels load 16 bytes at a time, and assume both without a check.
    """
    unit = 16 // x.itemsize
    is_aligned = not any(place % unit for place in (x.storage_offset(), *x.stride()[:-1]))
    return x if x.stride(-1) == 1 and is_aligned else x.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Case:
    """What the choice of a kernel depends on.

    ``explicit``: the probabilities are needed themselves; ``windowed``: the queries see windows of the keys, other than
    causality with as many keys as queries; ``one_key``: there is a single key; ``varying``: numbers of queries and keys
    come from data, and differ from call to call.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    masked: bool
    explicit: bool
    softcap: bool = False
    windowed: bool = False
    one_key: bool = False
    varying: bool = False

    @staticmethod
    def of(
        query: Tensor,
        value: Tensor,
        *,
        masked: bool,
        explicit: bool,
        softcap: float,
        windowed: bool = False,
        varying: bool = False,
    ) -> Case:
        sizes = query.shape[-1], value.shape[-1]
        how = masked, explicit, softcap != 0, windowed, value.shape[2] == 1, varying
        return Case(query.device.type, query.dtype, *sizes, *how)


@dataclass(frozen=True)
class Varlen:
    """Attention of pieces of sequences."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Grads]


@dataclass(frozen=True)
class Kernel:
    """What computes blocks, and how it differs from others.

    ``grouped``: whether the kernel reads K < H key heads as they are; if not, they are repeated for it.
    ``widens``: whether out and the gradients are in the dtype in which results are merged; if not, in that of queries.
    ``varlen``: the kernel's attention of pieces, if it has it.
    """

    name: str
    serves: Callable[[Case], bool]
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Grads]
    grouped: bool = True
    widens: bool = False
    varlen: Varlen | None = None

    def result_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of out and the gradients for queries of ``dtype``."""
        return compute_dtype(dtype) if self.widens else dtype


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which block results are merged."""
    return torch.float64 if dtype == torch.float64 else torch.float32
