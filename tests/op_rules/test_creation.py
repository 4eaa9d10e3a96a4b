"""Ops that make tensors from sizes."""

from __future__ import annotations

import pytest
import torch

from tests.support.brute_force import Case, case, check_case, ids, integers, randn

aten = torch.ops.aten


def unset(target: torch._ops.OpOverload, *args: object, **kwargs: object) -> Case:
    """A case whose entries mean nothing."""
    return Case(target, args, kwargs, same_values=False)


CASES = [
    case(aten.arange.default, 6, factors=""),
    case(aten.arange.start, 2, 8, factors=""),
    case(aten.arange.start_step, 0, 12, 2, factors=""),
    unset(aten.empty.memory_format, [4, 6]),
    unset(aten.empty_like.default, randn(4, 6)),
    case(aten.full.default, [4, 1, 6], 2.5, factors="i0 i2"),
    case(aten.full.default, [], 2.5),
    case(aten.full_like.default, randn(4, 6), 3.0, factors="i0 i1"),
    case(aten.linspace.default, 0.0, 1.0, 6, factors=""),
    unset(aten.new_empty.default, randn(3), [4, 6]),
    case(aten.new_full.default, randn(3, 2), [4, 6], 1.5, factors="i0 i1"),
    case(aten.new_ones.default, randn(4, 6), [4, 6], dtype=torch.bool),
    case(aten.new_zeros.default, integers(3, 2), [4, 6], factors="i0 i1"),
    case(aten.ones.default, [4, 6], dtype=torch.bool),
    case(aten.ones_like.default, randn(4, 6)),
    case(aten.scalar_tensor.default, 3.0, factors=""),
    case(aten.zeros.default, [4, 6]),
    case(aten.zeros_like.default, randn(4, 1, 6), dtype=torch.int64),
]


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_rule(case: Case) -> None:
    check_case(case)
