"""Ops that compute each row of a tensor from that row alone, for rows that are picked by what a tensor holds.

Only ops that give finite values and gradients for finite operands: they also run on rows that were not picked.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

import torch

from sptransform.op_rules.mask_ops import RETYPED

aten = torch.ops.aten

# Entry by entry, operands broadcast
ENTRYWISE = RETYPED | frozenset(
    {
        aten.abs.default,
        aten.add.Scalar,
        aten.add.Tensor,
        aten.bitwise_and.Tensor,
        aten.bitwise_not.default,
        aten.bitwise_or.Tensor,
        aten.clamp.default,
        aten.clamp_max.default,
        aten.clamp_min.default,
        aten.cos.default,
        aten.div.Scalar,
        aten.eq.Scalar,
        aten.eq.Tensor,
        aten.gelu.default,
        aten.le.Scalar,
        aten.le.Tensor,
        aten.logical_and.default,
        aten.logical_not.default,
        aten.logical_or.default,
        aten.lt.Scalar,
        aten.lt.Tensor,
        aten.ge.Scalar,
        aten.ge.Tensor,
        aten.gt.Scalar,
        aten.gt.Tensor,
        aten.masked_fill.Scalar,
        aten.mul.Scalar,
        aten.mul.Tensor,
        aten.ne.Scalar,
        aten.ne.Tensor,
        aten.neg.default,
        aten.relu.default,
        aten.rsub.Scalar,
        aten.sigmoid.default,
        aten.silu.default,
        aten.sin.default,
        aten.sub.Scalar,
        aten.sub.Tensor,
        aten.tanh.default,
        aten.where.ScalarOther,
        aten.where.self,
    }
)


def _adds_to_zero(eps: Sequence[float | None]) -> bool:
    """Whether a norm divides by something else than the zero of a row of zeros."""
    return not eps or eps[0] is None or eps[0] > 0


# Along the last dimensions of the first operand: op -> how many they are
LAST_DIMS: dict[Any, Any] = {
    aten.layer_norm.default: lambda args: len(args[1]) if _adds_to_zero(args[4:5]) else inf,
    aten.linear.default: lambda args: 1,
    aten.rms_norm.default: lambda args: len(args[1]) if _adds_to_zero(args[3:4]) else inf,
}
