"""Custom ops of the rewritten graph; importing this package registers them under ``torch.ops.sptransform``."""

from __future__ import annotations

from sptransform.ops import attention, lookup, random, redistribute, ring, sharding, softmax

__all__ = ["attention", "lookup", "random", "redistribute", "ring", "sharding", "softmax"]
