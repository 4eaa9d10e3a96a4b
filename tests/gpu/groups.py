"""All checks, by group."""

from __future__ import annotations

from collections.abc import Callable

from tests.gpu import kernels, names, processes, strategies
from tests.gpu.figures import Check

GROUPS: dict[str, Callable[[str], list[Check]]] = {
    "kernels": kernels.checks,
    "strategies": strategies.checks,
    "names": names.checks,
    "processes": processes.checks,
}
