"""Convolutions: channels, groups, and dimensions of which a rank reads a halo."""

from __future__ import annotations

import pytest
import torch

from tests.support.brute_force import Case, case, check_case, ids, randn, rule_for

aten = torch.ops.aten

CASES = [
    case(aten.conv1d.default, randn(2, 4, 13), randn(4, 1, 4), None, [1], [3], [1], 4, factors="batch groups i0"),
    case(aten.conv1d.default, randn(4, 13), randn(6, 4, 3), randn(6), [1], [1], factors="out i0"),
    case(aten.conv1d.default, randn(4, 12), randn(6, 2, 3), None, [2], [1], [1], 2, factors="groups in out i0"),
    case(aten.conv1d.default, randn(2, 4, 12), randn(6, 4, 2), None, [3], [0], [2], factors="batch in out i0"),
    case(aten.conv1d.default, randn(2, 4, 5), randn(6, 4, 7), None, [1], [9], factors="batch in out i0"),
    case(aten.conv1d.default, randn(2, 4, 5), randn(6, 4, 5), None, factors="batch in out"),
    # outputs of padding alone; rows that no output reads, between others and at the end
    case(aten.conv1d.default, randn(2, 4, 8), randn(6, 4, 2), randn(6), [2], [9], factors="batch out i0"),
    case(aten.conv1d.default, randn(2, 4, 8), randn(6, 4, 2), None, [5], factors="batch in out i0"),
    case(aten.conv1d.default, randn(2, 4, 8), randn(6, 4, 5), None, [2], factors="batch in out i0"),
    case(aten.conv1d.default, randn(2, 4, 7), randn(6, 4, 1), None, factors="batch in out i0"),
    case(aten.conv1d.padding, randn(2, 4, 9), randn(6, 4, 4), None, [1], "same", [2], factors="batch in out i0"),
    case(aten.conv2d.default, randn(2, 3, 6, 8), randn(4, 3, 2, 4), randn(4), [2, 4], factors="batch out i0 i1"),
    case(aten.conv2d.default, randn(2, 3, 6, 7), randn(4, 3, 3, 3), None, [2], [1], factors="batch in out i0 i1"),
    case(
        aten.conv2d.default, randn(1, 2, 7, 9), randn(3, 2, 3, 2), None, [2, 3], [2, 1], [2, 3], factors="in out i0 i1"
    ),
    case(aten.conv2d.padding, randn(2, 2, 5, 6), randn(4, 2, 2, 3), None, [1], "same", factors="batch in out i0 i1"),
    case(aten.conv3d.default, randn(3, 4, 6, 6), randn(4, 3, 2, 3, 3), None, [2, 3, 3], factors="in out i0 i1 i2"),
    case(aten.conv3d.padding, randn(1, 4, 3, 3), randn(2, 1, 3, 1, 1), None, [1], "valid", factors="out i0 i1 i2"),
    case(
        aten.convolution.default, randn(2, 4, 9), randn(4, 1, 3), randn(4), [1], [2], [1], False, [0], 4,
        factors="batch groups i0",
    ),
    case(aten.conv_transpose1d.default, randn(2, 6, 5), randn(6, 2, 3), None, [3], factors="batch in out i0"),
    case(aten.conv_transpose1d.default, randn(6, 5), randn(6, 1, 2), randn(3), [2], [0], [0], 3, factors="groups i0"),
    case(
        aten.conv_transpose2d.input, randn(2, 3, 4, 5), randn(3, 4, 2, 1), randn(4), [2, 1], factors="batch out i0 i1"
    ),
    case(
        aten.conv_transpose2d.input, randn(2, 4, 1, 5), randn(4, 3, 2, 2), None, [2], [0], [0], 2,
        factors="batch groups in out i1",
    ),
    case(aten.conv_transpose3d.input, randn(2, 3, 2, 3), randn(2, 1, 2, 2, 2), None, [2], factors="in i0 i1 i2"),
]

NO_RULE = [
    case(aten.convolution.default, randn(2, 4, 9), randn(4, 1, 3), None, [1], [2], [1], True, [0], 4),
    # blocks that overlap, of which borders are cut, or that are apart
    case(aten.conv_transpose1d.default, randn(2, 4, 9), randn(4, 2, 3), None, [2]),
    case(aten.conv_transpose1d.default, randn(2, 4, 9), randn(4, 2, 2), None, [2], [1]),
    case(aten.conv_transpose1d.default, randn(2, 4, 9), randn(4, 2, 2), None, [3]),
]


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_rule(case: Case) -> None:
    check_case(case)


@pytest.mark.parametrize("case", NO_RULE, ids=ids(NO_RULE))
def test_no_rule(case: Case) -> None:
    _, rule = rule_for(case)
    assert rule is None
