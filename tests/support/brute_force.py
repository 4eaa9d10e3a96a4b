"""The cases that the rules of this package are checked with, see :mod:`sptransform.testing.brute_force`."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor

import sptransform.ops  # noqa: F401 - registers the ops named here
from sptransform.op_rules import DEFAULT_RULES
from sptransform.rules.rule import OpCall, OpRule
from sptransform.testing import brute_force
from sptransform.testing.brute_force import GROUP, OUTER, Case, lines_of, together
from sptransform.testing.cuts import partitions
from tests.support.gloo_pool import current_test

__all__ = ["GROUP", "OUTER", "Case", "partitions", "together"]

# Operands that have no gradient.
CONSTANT_OPERANDS: dict[Any, tuple[str, ...]] = {
    torch.ops.aten.binary_cross_entropy_with_logits.default: ("weight", "pos_weight"),
    torch.ops.aten.cross_entropy_loss.default: ("weight",),
    torch.ops.aten.nll_loss_nd.default: ("weight",),
}


def case(target: Any, *args: Any, factors: str | None = None, **kwargs: Any) -> Case:
    """A :class:`Case`, written as the call it is."""
    return Case(target, args, kwargs, factors, constant=CONSTANT_OPERANDS.get(target, ()))


def check_case(checked: Case) -> None:
    """Raise AssertionError where the rule of the case's op, its decisions or its linearity does not hold."""
    brute_force.check_case(checked, DEFAULT_RULES)


def emit(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``Local.emit`` does in a graph, done at once."""
    return target(*args, **kwargs)


def call_of(checked: Case) -> tuple[OpCall, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The call as `op_call` would make it, with its operands and eager results."""
    (first, *_) = lines_of(checked)
    return first.call, first.operands, first.results


def rule_for(checked: Case) -> tuple[OpCall, OpRule | None]:
    call, _, _ = call_of(checked)
    return call, DEFAULT_RULES.rule_of(call)


def ids(cases: list[Case]) -> list[str]:
    """Distinct test names, in order."""
    return [f"{index}-{each}" for index, each in enumerate(cases)]


@functools.cache
def _generator_of(file: str) -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _generator() -> torch.Generator | None:
    """In a test the default one, which is seeded for each; in a table of cases one for each file."""
    return None if current_test() else _generator_of(sys._getframe(2).f_globals["__name__"])


def randn(*shape: int) -> Tensor:
    """Float64 entries, the same at every run."""
    return torch.randn(shape, dtype=torch.float64, generator=_generator())


def positive(*shape: int) -> Tensor:
    """Float64 entries between 0.1 and 0.9: within every op's domain."""
    return torch.rand(shape, dtype=torch.float64, generator=_generator()) * 0.8 + 0.1


def integers(high: int, *shape: int) -> Tensor:
    """Int64 entries in ``0 .. high-1``."""
    return torch.randint(high, shape, generator=_generator())


def booleans(*shape: int) -> Tensor:
    return torch.rand(shape, generator=_generator()) < 0.5
