"""`sptransform calibrate`: a hardware file of this machine, from what its ranks measure."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from sptransform.cli import measuring
from sptransform.cli.measuring import LONG, MESSAGES, SHORT, Found
from sptransform.cost.hardware import Constant, Hardware
from sptransform.cost.times import FLOPS_OF_PASSES
from sptransform.diagnostics.errors import UsageError, describe
from sptransform.testing.processes import on_processes

TIMEOUT = 120.0  # seconds of one of the measurements
_KERNEL = "measured"
# name -> what the ranks run
MEASUREMENTS: dict[str, Callable[[int, int], Found]] = {
    "products of matrices": measuring.matmuls,
    "memory": measuring.memory,
    "attention": measuring.attention,
    "messages": measuring.messages,
}

Progress = Callable[[str, int, int], None]


def calibrate(num_ranks: int, progress: Progress = lambda name, done, of: None) -> Hardware:
    """This machine, as ``num_ranks`` processes that are busy at once find it.

    Each has a GPU if there are as many; they share one if there is one. On CPUs each has one thread.

    Args:
        num_ranks: as many as will run: of ranks that share cores, each computes less.
        progress: called with the name of each measurement, how many are done, and of how many.

    Raises:
        UsageError: fewer than two ranks.
    """
    if num_ranks < 2:
        fix = "--ranks 2 or more: one rank sends nothing"
        raise UsageError(describe("messages are measured between ranks", found=f"{num_ranks} ranks", fix=fix))
    found = {}
    for done, (name, measure) in enumerate(MEASUREMENTS.items()):
        progress(name, done, len(MEASUREMENTS))
        found[name] = mean_of(on_processes(num_ranks, measure, timeout=TIMEOUT))
    progress("", len(MEASUREMENTS), len(MEASUREMENTS))
    source = f"sptransform calibrate: {num_ranks} ranks at once, torch {torch.__version__}"
    return Hardware("calibrated", _what(num_ranks), constants_of(*found.values(), num_ranks=num_ranks, source=source))


def mean_of(ranks: list[Found]) -> Found:
    """Each figure's mean over ranks."""
    return {name: fmean(rank[name] for rank in ranks) for name in ranks[0]}


def _what(num_ranks: int) -> str:
    if torch.cuda.is_available():
        return f"{platform.node()}: {torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {num_ranks} ranks"
    return f"{platform.node()}: {num_ranks} gloo ranks of one thread on {os.cpu_count()} CPUs"


def constants_of(
    products: Found, memory: Found, attention: Found, messages: Found, *, num_ranks: int, source: str
) -> dict[str, Constant]:
    """The constants of a hardware file from what was measured; docs/hardware.md says what they mean."""
    on_gpu = torch.cuda.is_available()
    dtype = "bfloat16" if on_gpu else "float32"
    units: dict[str, tuple[Any, str]] = {
        "memory.bytes": (_memory_bytes(num_ranks), "B"),
        "memory.bandwidth": (memory["copy"], "B/s"),
        "memory.efficiency": (min(memory["pointwise"] / memory["copy"], 1.0), ""),
        "launch.seconds": (memory["launch"], "s"),
        "processors": (torch.cuda.get_device_properties(0).multi_processor_count if on_gpu else 1, ""),
        **{f"peak_flops.{name}": (rate, "FLOP/s") for name, rate in products.items()},
        "matmul.efficiency": (1.0, ""),
        "attention.kernel": (_KERNEL, ""),
        "attention.tile": (128 if on_gpu else 1, "queries"),
        "node.ranks": (num_ranks, ""),
        "inside.shared": (False, ""),
        "inside.overlaps": (messages["overlaps"] > 0.5, ""),
        **_links(messages, num_ranks),
    }
    slower = products["bfloat16"] / products[dtype]  # rates are those of bfloat16, by the formula of times.py
    for direction in FLOPS_OF_PASSES:
        for name, (value, unit) in _kernel(attention, direction, slower).items():
            units[f"attention.{_KERNEL}.{direction}.{name}"] = value, unit
    return {name: Constant(value, unit, source) for name, (value, unit) in units.items()}


def _kernel(attention: Found, direction: str, slower: float) -> dict[str, tuple[float, str]]:
    """The formula of attention, solved for its constants.

    The seconds of a row of queries are those of a pair, times the pairs and the keys that are lost beside them. Two
    lengths give both; a wider head parts the products of a pair from its exponential; a causal mask says what it cuts.
    """
    short, long, wide, causal = (attention[f"{direction}.{name}"] for name, *_ in measuring.ATTENTIONS)
    products = sum(FLOPS_OF_PASSES[direction]) * 2 * 64  # FLOPs of a pair
    pair = max((long - short) / (LONG - SHORT), long / LONG / 2)  # noise must not make it nothing
    lost = max(long / pair - LONG, 0.0)
    per_flop = (wide / (LONG + lost) - pair) / products  # the wider head has twice the products
    per_flop = min(max(per_flop, pair / products / 2), pair / products)
    pairs = (LONG + 1) / 2
    masked = max(causal / pair - pairs - lost, 0.0) / (1 - pairs / LONG)
    return {
        "flops": (slower / per_flop, "FLOP/s"),
        "seconds_per_score": (max(pair - per_flop * products, 0.0), "s"),
        "lost_keys": (lost, "keys"),
        "masked_keys": (masked, "keys"),
    }


def _links(messages: Found, num_ranks: int) -> dict[str, tuple[float, str]]:
    few, many = MESSAGES
    latency, bandwidth = {}, {}
    for kind in measuring.KINDS:
        taken = max(messages[f"{kind}.many"] - messages[f"{kind}.few"], messages[f"{kind}.many"] / 2)
        bandwidth[kind] = (many - few) / taken
        latency[kind] = max(messages[f"{kind}.few"] - few / bandwidth[kind], 0.0)
    passing = ("all_gather", "reduce_scatter", "all_reduce")
    return {
        "inside.small.bytes": (0, "B"),
        "inside.small.latency": (latency["send_recv"], "s"),
        "inside.small.bandwidth": (bandwidth["send_recv"], "B/s"),
        "inside.latency": (latency["send_recv"], "s"),
        "inside.bandwidth": (bandwidth["send_recv"], "B/s"),
        "inside.collective.latency_per_rank": (fmean(latency[kind] for kind in passing) / num_ranks, "s"),
        **{f"inside.{kind}.bandwidth": (bandwidth[kind], "B/s") for kind in (*passing, "all_to_all")},
        "inside.all_to_all.latency": (latency["all_to_all"], "s"),
    }


def _memory_bytes(num_ranks: int) -> int:
    """What each rank may use."""
    if torch.cuda.is_available():
        sharing = -(-num_ranks // torch.cuda.device_count())
        return torch.cuda.get_device_properties(0).total_memory // sharing
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // num_ranks


def write(hardware: Hardware, path: str | Path) -> None:
    """Write the file; raises UsageError where it cannot be written."""
    try:
        hardware.write(path)
    except OSError as error:
        fix = "--out with the path of a file that may be written"
        raise UsageError(describe(f"{path} cannot be written", found=str(error), fix=fix)) from error
