"""Custom ops of the rewritten graph; importing this package registers them under ``torch.ops.sptransform``."""

from __future__ import annotations

from sptransform.ops import (
    attention,
    autograd_function,
    before_write,
    dropout_mask,
    flops,
    grouped_product,
    joined_moments,
    joined_softmax,
    linear_cross_entropy,
    local_index,
    local_slice,
    logit_sums,
    lookup,
    normalized,
    redistribute,
    ring,
    scan,
    with_value,
)

__all__ = [
    "attention",
    "autograd_function",
    "before_write",
    "dropout_mask",
    "flops",
    "grouped_product",
    "joined_moments",
    "joined_softmax",
    "linear_cross_entropy",
    "local_index",
    "local_slice",
    "logit_sums",
    "lookup",
    "normalized",
    "redistribute",
    "ring",
    "scan",
    "with_value",
]
