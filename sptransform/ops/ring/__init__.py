"""Ring attention: the op, its schedule, and the kernels that compute its blocks."""

from __future__ import annotations

from sptransform.ops.ring import blocks, ring_attention
from sptransform.ops.ring.kernels.table import kernel_name
from sptransform.ops.ring.plan import attended_pairs, plan_calls
from sptransform.ops.ring.trace_steps import trace_steps

__all__ = ["attended_pairs", "blocks", "kernel_name", "plan_calls", "ring_attention", "trace_steps"]
