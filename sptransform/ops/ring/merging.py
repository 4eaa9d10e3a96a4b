"""Merging of attention results over different keys: the online softmax.

``out`` and ``lse`` over two sets of keys give those over all of them (Milakov and Gimelshein, arXiv 1805.02867): the
weight of each is ``exp(its lse)``. ``lse`` is ``-inf`` where a row has seen no key.

An additive mask may hide a key with a finite number so low that the score is lost to rounding. If a row sees only such
keys, a single device averages their values. ``lse`` then cannot tell how many keys there were, because the logarithm of
their number is lost to rounding as well. Such a row is *sunk*: its ``lse`` is ``-UNIT`` times its number of keys. That
is below every other ``lse``, and sunk rows are merged by adding it up.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

UNIT = 2.0**80


def is_sunk(lse: Tensor) -> Tensor:
    """Rows whose ``lse`` is so low that a number of order one added to it is lost to rounding in this dtype."""
    return (lse < -1 / torch.finfo(lse.dtype).eps) & (lse != -math.inf)


def sink(lse: Tensor, bias: Tensor) -> Tensor:
    """A kernel's ``lse`` under ``bias`` [.., s, t], with sunk rows set to ``-UNIT`` times their number of keys."""
    at_most = (bias == bias.amax(-1, keepdim=True)).sum(-1)  # keys that are masked by more have no weight beside them
    return torch.where(is_sunk(lse), at_most * -UNIT, lse)


def raise_sunk(grad: Tensor, lse: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The ``grad`` and ``lse`` with which a kernel's backward is right for sunk rows.

    With the row's bias as lse, the kernel computes each probability as 1 instead of 1 / n; grad / n corrects that.
    """
    sunk = is_sunk(lse)
    share = torch.where(sunk, -UNIT / lse, 1)
    return grad * share[..., None].to(grad.dtype), torch.where(sunk, bias.amax(-1), lse)


def weigh(lse: Tensor, block_lse: Tensor, may_sink: bool) -> tuple[Tensor, Tensor]:
    """The weight [B, H, s, 1] of a block in the merged result, and the lse over the keys of both.

    ``may_sink``: the mask may leave sunk rows.
    """
    weight = torch.sigmoid(block_lse - lse)
    total = torch.logaddexp(lse, block_lse)
    if may_sink:
        both, added = is_sunk(lse) & is_sunk(block_lse), lse + block_lse
        weight, total = torch.where(both, block_lse / added, weight), torch.where(both, added, total)
    # NaN comes from -inf - -inf, where neither has seen a key
    return weight.nan_to_num(0.0).unsqueeze(-1), total


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """``out`` [B, H, s, E] and ``lse`` [B, H, s] over all keys, with one more logit a head, ``sinks`` [H], that has no
    value.
    """
    sinks = sinks.to(lse.dtype)[:, None]
    weight = torch.sigmoid(lse - sinks).nan_to_num(0.0)  # NaN as above
    return out * weight.unsqueeze(-1), torch.logaddexp(lse, sinks)


def grad_of_sinks(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """The gradient [H] of ``sinks``: ``grad`` and ``out`` [B, H, s, E] and ``lse`` [B, H, s] are those with sinks.

    It holds with dropout, which is in ``out`` as it is in what the probabilities are multiplied by.
    """
    probabilities = (sinks.to(lse.dtype)[:, None] - lse).exp().nan_to_num(0.0)
    grad_lse = (grad.to(lse.dtype) * out).sum(-1)
    return -(probabilities * grad_lse).sum((0, 2)).to(sinks.dtype)
