"""Cumulative sums and recurrences, whole and joined over ranks."""

from __future__ import annotations

import pytest
import torch

from tests.support.brute_force import OUTER, Case, case, check_case, ids, positive, randn

aten, sp = torch.ops.aten, torch.ops.sptransform

CASES = [
    case(aten.cumprod.default, positive(4, 6), 1, factors="i0"),
    case(aten.cumsum.default, randn(4, 6), -1, factors="i0"),
    case(aten.cumsum.default, randn(7).long(), 0, factors=""),
    Case(aten.cumsum.default, (randn(3, 4, 2).float(), 1), {"dtype": torch.float64}, "i0 i2", tolerance=1e-6),
    case(aten.cumsum.default, randn(), 0),
    case(aten.cumsum.default, randn(4, 1), 1, factors="i0"),
    # along a dimension cut over the mesh dim before
    Case(sp.joined_cumprod.default, (positive(4, 6), 1, torch.float64, 1, 2, OUTER), factors="i0", outer=2),
    Case(sp.joined_cumsum.default, (randn(4, 6), 1, torch.float64, 3, 2, OUTER), factors="i0", outer=2),
    Case(sp.joined_scan.default, (randn(4, 5, 2), randn(4, 5, 1), 1, 1, 2, OUTER), factors="i0 i2", outer=2),
    case(sp.scan.default, randn(2, 5, 3), randn(2, 5, 1), 1, factors="i0 i2"),
    case(sp.scan.default, randn(2, 3, 4), randn(1, 1, 4), -1, factors="i0 i1"),
    case(sp.scan.default, randn(2, 1, 3), randn(2, 1, 3), 1, factors="i0 i2"),
]


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_rule(case: Case) -> None:
    check_case(case)
