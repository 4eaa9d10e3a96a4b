"""The kernel that `explain` names for a ring is the one that runs."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import sptransform
from sptransform.ops.groups import process
from sptransform.testing.pretended import Asked, Runnable, forward_and_backward, on_pretended_ranks
from tests.gpu.figures import Check
from tests.gpu.strategies import build

# what the profiler sees of each: ops, forward and backward, of which one must run
OPS = {
    "CPU flash": ("_scaled_dot_product_flash_attention_for_cpu",),
    "flash-attn": ("flash_attn::",),
    "CUDA flash": ("aten::_flash_attention_forward", "aten::_flash_attention_backward"),
    "cuDNN": ("cudnn_attention",),
    "CUDA memory-efficient": ("_efficient_attention_forward", "_efficient_attention_backward"),
    "PyTorch reference": ("aten::_safe_softmax",),
}
RUNS = (
    ("written by hand", torch.bfloat16),
    ("written by hand", torch.float32),
    ("written by hand", torch.float64),
    ("padded", torch.bfloat16),
    ("packed documents", torch.bfloat16),
    ("sliding window", torch.bfloat16),
)


def _events(device: str, graph: Runnable) -> set[str]:
    """What the profiler sees of the first rank: it looks at the thread that starts it."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) if process() == 0 else nullcontext() as profiled:
        forward_and_backward(graph)
        if device == "cuda":
            torch.cuda.synchronize()
    return set() if profiled is None else {event.key for event in profiled.key_averages()}


def checks(device: str) -> list[Check]:
    return [
        Check("names", f"{name}, {str(dtype).removeprefix('torch.')}", partial(_compare, name, dtype, device))
        for name, dtype in RUNS
    ]


def _compare(name: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    model, inputs = build(name, dtype, device)
    explanation = sptransform.explain(model, "ring", inputs, world_size=2)
    named = {ring["kernel"] for ring in explanation.to_dict()["rings"]}
    asked = Asked(2, "ring")
    ranks = on_pretended_ranks(model, inputs, [asked], outputs="loss")[asked]
    events = sorted(set.union(*ranks.run(partial(_events, device))))
    ran = {kernel for kernel, ops in OPS.items() if any(op in event for op in ops for event in events)}
    device_kernels = [event for event in events if any(word in event for word in ("fmha", "flash_", "cudnn_generated"))]
    wrong = [f"explain names {sorted(named)}, {sorted(ran)} ran"] if not named <= ran else []
    return {"named": sorted(named), "ran": sorted(ran), "device kernels": device_kernels, "wrong": wrong}
