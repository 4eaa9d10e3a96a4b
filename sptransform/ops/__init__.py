"""Custom ops of the rewritten graph; importing this package registers them under ``torch.ops.sptransform``."""

from __future__ import annotations

from sptransform.ops import attention, random, redistribute, ring, sharding

__all__ = ["attention", "random", "redistribute", "ring", "sharding"]
