"""Merging of attention results over different keys: the online softmax.

``out`` and ``lse`` over two sets of keys give those over all of them (Milakov and Gimelshein, arXiv 1805.02867): the
weight of each is ``exp(its lse)``. ``lse`` is ``-inf`` where a row has seen no key.

``lse`` is float64, whatever the kernels compute in. An additive mask may hide a key with a finite number so low that
the score is lost to rounding. If a row sees only such keys, a single device averages the values of those that are
hidden by least. Such a row is *sunk*: its ``lse`` is the number by which they are hidden, its *level*, with their count
in the last bits. That is below every other ``lse``. Of two sunk rows the one of the higher level is all there is; at
equal levels the counts add up.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sptransform.ops.ring.kernels.interface import compute_dtype

_COUNT = 2**28 - 1  # bits of a count; the others tell levels apart that differ by more than 1 part in 2**24
_LARGE = 64.0  # beside a larger number, the lse of a kernel loses digits that matter


def is_sunk(lse: Tensor, dtype: torch.dtype) -> Tensor:
    """Where scores are lost to rounding beside ``lse``, or a bias, in a kernel that computes in ``dtype``."""
    return (lse < -_LARGE / torch.finfo(dtype).eps) & (lse != -math.inf)


def shift_of(bias: Tensor) -> Tensor:
    """What to take from the rows of ``bias`` [.., s, t], and add to their ``lse``, that the kernel keeps its digits.

    Rows of which every key has a large number added then have the probabilities that their scores say, where one device
    may lose them to rounding.
    """
    top = bias.amax(-1)
    return torch.where((top.abs() > _LARGE) & ~is_sunk(top, bias.dtype) & top.isfinite(), top, 0.0)


def _level(x: Tensor) -> Tensor:
    """The bits of a level. As integers, those of negative doubles grow with the magnitude."""
    return x.to(torch.float64).view(torch.int64) & ~_COUNT


def _count(lse: Tensor) -> Tensor:
    return (lse.view(torch.int64) & _COUNT).double()


def _sunk(level: Tensor, count: Tensor) -> Tensor:
    return (level | count.long()).view(torch.float64)


def sink(lse: Tensor, bias: Tensor) -> Tensor:
    """A kernel's ``lse`` under ``bias`` [.., s, t], in float64, with sunk rows as they are written."""
    at_most = (bias == bias.amax(-1, keepdim=True)).sum(-1)
    return torch.where(is_sunk(lse, bias.dtype), _sunk(_level(lse), at_most), lse.to(torch.float64))


def raise_sunk(grad: Tensor, lse: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The ``grad`` and ``lse`` with which a kernel's backward is right for sunk rows.

    With the row's level as lse, the kernel computes each probability as 1 instead of 1 / n, and as 0 for keys that are
    hidden by more; grad / n corrects that.
    """
    sunk, top, level = is_sunk(lse, bias.dtype), bias.amax(-1).double(), _level(lse)
    exact = torch.where(_level(top) == level, top, level.view(torch.float64))  # the bias, if the level is its rounding
    share = torch.where(sunk, 1 / _count(lse).clamp(min=1), 1.0).to(bias.dtype)
    return (grad * share[..., None]).to(grad.dtype), torch.where(sunk, exact, lse)


def weigh(lse: Tensor, block_lse: Tensor, may_sink: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The weight [B, H, s, 1] of a block in the merged result, and the lse over the keys of both.

    ``may_sink``: the mask may leave sunk rows; ``dtype``: of the result, and what kernels compute in.
    """
    weight = torch.sigmoid(block_lse - lse)
    total = torch.logaddexp(lse, block_lse)
    if may_sink:
        both = is_sunk(lse, dtype) & is_sunk(block_lse, dtype)
        level, block_level = _level(lse), _level(block_lse)
        count, block_count = _count(lse), _count(block_lse)
        share = torch.where(level == block_level, block_count / (count + block_count), (block_level < level).double())
        higher = torch.where(block_level < level, block_lse, lse)
        joined = torch.where(level == block_level, _sunk(level, count + block_count), higher)
        weight, total = torch.where(both, share, weight), torch.where(both, joined, total)
    # NaN comes from -inf - -inf, where neither has seen a key
    return weight.nan_to_num(0.0).unsqueeze(-1).to(dtype), total


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """``out`` [B, H, s, E] and ``lse`` [B, H, s] over all keys, with one more logit a head, ``sinks`` [H], that has no
    value.
    """
    sinks = sinks.to(lse.dtype)[:, None]
    weight = torch.sigmoid(lse - sinks).nan_to_num(0.0)  # NaN as above
    return out * weight.unsqueeze(-1).to(out.dtype), torch.logaddexp(lse, sinks)


def grad_of_sinks(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """The gradient [H] of ``sinks``: ``grad`` and ``out`` [B, H, s, E] and ``lse`` [B, H, s] are those with sinks.

    It holds with dropout, which is in ``out`` as it is in what the probabilities are multiplied by.
    """
    probabilities = (sinks.to(lse.dtype)[:, None] - lse).exp().nan_to_num(0.0)
    dtype = compute_dtype(out.dtype)
    grad_lse = (grad.to(dtype) * out.to(dtype)).sum(-1)
    return -(probabilities * grad_lse).sum((0, 2)).to(sinks.dtype)
