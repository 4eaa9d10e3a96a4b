"""Results over some keys, put together with results over others: the online softmax.

``out`` and ``lse`` over some keys and over others give those over all of them (Milakov and Gimelshein, arXiv
1805.02867): the weight of each is ``exp(its lse)``. ``lse`` is ``-inf`` where a row has seen nothing.

A mask that is added to the scores may hide a key by a finite number so low that the score beside it is lost to
rounding. One device then averages the values of a row that sees no other keys, and ``lse`` cannot say over how many:
the logarithm of their number is lost as well. Such a row is *sunk*: its ``lse`` is ``-UNIT`` times the number of its
keys, below every other, and that is what is added up.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

UNIT = 2.0**80


def is_sunk(lse: Tensor) -> Tensor:
    """Rows of so low scores that a float of this dtype has no room for a number of order one beside them."""
    return (lse < -1 / torch.finfo(lse.dtype).eps) & (lse != -math.inf)


def sink(lse: Tensor, bias: Tensor) -> Tensor:
    """``lse`` as a kernel gave it under ``bias`` [.., s, t], with the numbers of keys of the rows that are sunk."""
    return torch.where(is_sunk(lse), (bias != -math.inf).sum(-1) * -UNIT, lse)


def raise_sunk(grad: Tensor, lse: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The ``grad`` and ``lse`` with which a kernel's backward is right for sunk rows.

    With the lowest score as lse it takes each probability for 1 instead of 1 / n; grad / n makes up for that.
    """
    sunk = is_sunk(lse)
    share = torch.where(sunk, -UNIT / lse, 1)
    return grad * share[..., None].to(grad.dtype), torch.where(sunk, bias.amax(-1), lse)


def weigh(lse: Tensor, block_lse: Tensor, sinks: bool) -> tuple[Tensor, Tensor]:
    """The weight of a block beside what is there, [B, H, s, 1], and the lse over the keys of both."""
    weight = torch.sigmoid(block_lse - lse)
    total = torch.logaddexp(lse, block_lse)
    if sinks:
        both, added = is_sunk(lse) & is_sunk(block_lse), lse + block_lse
        weight, total = torch.where(both, block_lse / added, weight), torch.where(both, added, total)
    # -inf - -inf where neither has seen anything
    return weight.nan_to_num(0.0).unsqueeze(-1), total
