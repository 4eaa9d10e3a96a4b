"""Pools: windows that ranks read beyond their borders, and the number of entries that a mean divides by."""

from __future__ import annotations

import pytest
import torch

from tests.support.brute_force import Case, case, check_case, ids, randn

aten = torch.ops.aten

CASES = [
    case(aten._adaptive_avg_pool2d.default, randn(2, 3, 6, 5), [3, 1], factors="i0 i1 i2 k3"),
    case(aten._adaptive_avg_pool2d.default, randn(3, 4, 7), [4, 3], factors="i0 i1"),
    case(aten._adaptive_avg_pool3d.default, randn(2, 4, 6, 2), [2, 1, 2], factors="i0 i1 i3 k2"),
    case(aten.adaptive_avg_pool1d.default, randn(2, 3, 7), [1], factors="i0 i1 k2"),
    case(aten.adaptive_avg_pool2d.default, randn(2, 3, 7, 4), [1, 1], factors="i0 i1 k2 k3"),
    case(aten.adaptive_avg_pool2d.default, randn(3, 1, 6), [1, 3], factors="i0 i2"),
    case(aten.adaptive_avg_pool3d.default, randn(3, 4, 3, 2), [4, 1, 2], factors="i0 i1 i3 k2"),
    case(aten.avg_pool2d.default, randn(2, 3, 7, 6), [3], [1], [1], False, False, factors="d0 d1 i0 i1"),
    case(aten.avg_pool2d.default, randn(2, 7, 8), [3, 2], [2, 2], [1, 0], factors="d0 i0 i1"),
    case(aten.avg_pool2d.default, randn(2, 7, 6), [3, 2], [2, 1], [1, 1], False, True, 5, factors="d0 i0 i1"),
    # windows beyond the padding count less
    case(aten.avg_pool2d.default, randn(2, 6, 7), [3], [2], [0], True, True, factors="d0"),
    case(aten.avg_pool2d.default, randn(2, 6, 7), [3], [2], [1], True, False, factors="d0 i0 i1"),
    case(aten.avg_pool2d.default, randn(2, 6, 7), [3], [2], [0], True, False, factors="d0 i0 i1"),
    case(aten.avg_pool3d.default, randn(2, 4, 6, 4), [2], factors="d0 i0 i1 i2"),
    case(aten.avg_pool3d.default, randn(2, 4, 3, 4), [3], [1], [1], factors="d0 i0 i1 i2"),
    case(aten.max_pool1d.default, randn(2, 3, 7), [3], [2], [1], factors="d0 d1 i0"),
    case(aten.max_pool1d.default, randn(3, 9), [2], [2], [0], [3], True, factors="d0 i0"),
    case(aten.max_pool2d.default, randn(2, 3, 7, 6), [3], [2], [1], factors="d0 d1 i0 i1"),
    case(aten.max_pool2d.default, randn(2, 6, 7), [2], [2], factors="d0 i0 i1"),
    case(aten.max_pool2d.default, randn(2, 6, 7), [3], [2], [0], [1], True, factors="d0 i0 i1"),
    # of what is negative the padding must not be the largest
    case(aten.max_pool2d.default, -randn(2, 5, 5).abs() - 1, [3], [1], [1], [2], factors="d0 i0 i1"),
    case(aten.max_pool3d.default, randn(2, 4, 6, 3), [2, 3, 3], factors="d0 i0 i1"),
]


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_rule(case: Case) -> None:
    check_case(case)
