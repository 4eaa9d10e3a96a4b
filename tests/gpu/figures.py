"""A check, what it finds, and how far a result may be from the definition."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# The largest relative error of a tensor, as a norm: a few roundings of the dtype in which kernels read their inputs.
BOUNDS = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Check:
    """``run()`` returns figures. Whatever is wrong is in the list ``wrong`` of them; an exception is wrong too."""

    group: str
    name: str
    run: Callable[[], dict[str, Any]]

    def figures(self) -> dict[str, Any]:
        try:
            return self.run()
        except Exception as error:
            return {"wrong": [_in_short(error)]}


@dataclass
class Errors:
    """The largest errors among many cases, and the cases whose error is above its bound."""

    bound: float
    cases: int = 0
    worst: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def add(self, case: str, compare: Callable[[], dict[str, float]]) -> None:
        """``compare()`` gives the error of each result of a case by name."""
        self.cases += 1
        try:
            found = compare()
        except Exception as error:
            self.wrong.append(f"{case}: {_in_short(error)}")
            return
        for name, error in found.items():
            self.worst[name] = max(self.worst.get(name, 0.0), error)
            if not error <= self.bound:  # nan too
                self.wrong.append(f"{case}: {name} differs by {error:.2g}, allowed {self.bound:.2g}")

    def figures(self) -> dict[str, Any]:
        return {"cases": self.cases, "worst": self.worst, "bound": self.bound, "wrong": self.wrong}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    if found.shape != expected.shape:
        raise AssertionError(f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-30))


def _in_short(error: Exception) -> str:
    line = f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    at = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""
    return line[:600] + at
