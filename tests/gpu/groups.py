"""All checks, by group."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tests.gpu import kernels, names, processes, strategies
from tests.gpu.figures import Check

GROUPS: dict[str, Callable[[str], list[Check]]] = {
    "kernels": kernels.checks,
    "strategies in 16 bits": partial(strategies.checks, bits=(16,)),
    "strategies in 32 and 64 bits": partial(strategies.checks, bits=(32, 64)),
    "names": names.checks,
    "processes": processes.checks,
}
