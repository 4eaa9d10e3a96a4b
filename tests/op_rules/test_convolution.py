"""Convolutions of patches, and those that need neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sptransform.op_rules import DEFAULT_RULES
from tests.support.brute_force import Case, call_of, case, check_case, ids, randn

aten = torch.ops.aten


def convolved(
    x: Any, weight: Any, bias: Any, stride: list[int], *, padding: Any = None, groups: int = 1, factors: str
) -> Case:
    nothing, one = [0] * len(stride), [1] * len(stride)
    args = (x, weight, bias, stride, padding or nothing, one, False, nothing, groups)
    return case(aten.convolution.default, *args, factors=factors)


CASES = [
    convolved(randn(2, 3, 12), randn(5, 3, 3), randn(5), [3], factors="n i0"),
    convolved(randn(2, 3, 8, 6), randn(5, 3, 2, 3), None, [2, 3], factors="n i0 i1"),
    convolved(randn(2, 4, 6), randn(4, 1, 1), None, [1], groups=4, factors="n i0"),
]


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_rule(case: Case) -> None:
    check_case(case)


NO_RULE = [
    convolved(randn(2, 3, 8), randn(5, 3, 3), randn(5), [1], padding=[1], factors=""),
    convolved(randn(2, 3, 8, 6), randn(5, 3, 3, 3), None, [3, 3], factors=""),
    case(aten.convolution.default, randn(2, 3, 8), randn(3, 5, 3), None, [1], [0], [1], True, [0], 1),
]


@pytest.mark.parametrize("case", NO_RULE, ids=ids(NO_RULE))
def test_no_rule(case: Case) -> None:
    call, _, _ = call_of(case)
    assert DEFAULT_RULES.rule_of(call) is None
