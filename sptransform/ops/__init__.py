"""Custom ops of the rewritten graph; importing this package registers them under ``torch.ops.sptransform``."""

from __future__ import annotations

from sptransform.ops import (
    attention,
    dropout_mask,
    joined_softmax,
    local_index,
    local_slice,
    lookup,
    redistribute,
    ring,
    scan,
)

__all__ = [
    "attention",
    "dropout_mask",
    "joined_softmax",
    "local_index",
    "local_slice",
    "lookup",
    "redistribute",
    "ring",
    "scan",
]
