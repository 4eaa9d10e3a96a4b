"""The memory that a program holds, as torch's profiler sees it."""

from __future__ import annotations

from torch.profiler import profile


def memory_held(found: profile) -> tuple[int, int]:
    """The most bytes held at a time, and those held at the end, beyond those held before.

    ``found``: of a profile with ``profile_memory=True``, which sees every allocation on the CPU.
    """
    live = peak = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak, live
