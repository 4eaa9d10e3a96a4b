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

from torch import Tensor

from sptransform.ops.ring.kernels import cuda
from sptransform.ops.ring.kernels.cpu import flash, flash_backward
from sptransform.ops.ring.kernels.interface import Case, Kernel
from sptransform.ops.ring.kernels.reference import OPEN

TABLE = (
    Kernel(
        "CPU flash",
        lambda case: case.device == "cpu" and case.head_dim == case.value_dim and not case.dropout,
        flash,
        flash_backward,
    ),
    Kernel(
        "flash-attn",
        lambda case: cuda.is_plain(case) and cuda.has_flash_attn() and case.head_dim == case.value_dim,
        cuda.flash_attn,
        cuda.flash_attn_backward,
    ),
    Kernel(
        "CUDA flash",
        lambda case: cuda.is_plain(case) and case.head_dim == case.value_dim,
        cuda.flash,
        cuda.flash_backward,
    ),
    Kernel(
        "cuDNN",
        lambda case: cuda.is_plain(case) and case.head_dim <= 192 and case.value_dim <= 128,
        cuda.cudnn,
        cuda.cudnn_backward,
        grouped=False,
    ),
    Kernel(
        "CUDA memory-efficient",
        cuda.is_efficient,
        cuda.efficient,
        cuda.efficient_backward,
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
