"""Unfolding, pixel shuffles, resizing: where rows go that are cut, and what stays whole."""

from __future__ import annotations

import pytest
import torch

from tests.support.brute_force import Case, case, check_case, ids, randn

aten = torch.ops.aten

CASES = [
    case(aten._upsample_bicubic2d_aa.vec, randn(2, 3, 4, 5), [3, 6], False, None, factors="i0 i1"),
    case(aten._upsample_bilinear2d_aa.vec, randn(2, 3, 4, 5), [4, 6], False, None, factors="i0 i1 i2"),
    case(aten._upsample_nearest_exact1d.vec, randn(2, 3, 5), [10], None, factors="i0 i1 i2"),
    case(aten._upsample_nearest_exact2d.vec, randn(2, 3, 4, 5), [8, 7], None, factors="i0 i1 i2"),
    case(aten._upsample_nearest_exact3d.vec, randn(1, 2, 2, 4, 3), [6, 4, 3], None, factors="i1 i2 i3 i4"),
    case(aten.col2im.default, randn(2, 12, 6), [4, 9], [2, 3], [1, 1], [0, 0], [2, 3], factors="d0 d1 i j"),
    case(aten.col2im.default, randn(8, 12), [4, 5], [2, 2], [1, 1], [0, 0], [1, 1], factors="d0"),
    case(aten.im2col.default, randn(2, 3, 6, 4), [3, 2], [1, 1], [0, 0], [3, 2], factors="d0 d1 i j"),
    case(aten.im2col.default, randn(2, 3, 6, 4), [3, 2], [1, 1], [1, 0], [3, 2], factors="d0 d1"),
    case(aten.im2col.default, randn(1, 6, 4), [1, 2], [1, 1], [0, 0], [1, 2], factors="i j"),
    case(aten.pixel_shuffle.default, randn(2, 12, 3, 4), 2, factors="d0 d1 i j"),
    case(aten.pixel_shuffle.default, randn(4, 3, 4), 2, factors="i j"),
    case(aten.pixel_unshuffle.default, randn(2, 3, 6, 4), 2, factors="d0 d1 i j"),
    case(aten.upsample_bicubic2d.vec, randn(2, 3, 4, 5), None, True, [1.0, 2.0], factors="i0 i1 i2"),
    case(aten.upsample_bilinear2d.vec, randn(2, 3, 4, 5), [4, 5], True, None, factors="i0 i1 i2 i3"),
    case(aten.upsample_bilinear2d.vec, randn(2, 3, 4, 5), None, False, [1.1, 1.7], factors="i0 i1"),
    case(aten.upsample_linear1d.vec, randn(2, 3, 4), [9], False, None, factors="i0 i1"),
    case(aten.upsample_nearest1d.vec, randn(2, 3, 4), None, [2.4], factors="i0 i1"),
    case(aten.upsample_nearest2d.vec, randn(2, 3, 4, 5), None, [2.0, 3.0], factors="i0 i1 i2 i3"),
    case(aten.upsample_nearest3d.vec, randn(1, 2, 2, 4, 1), [2, 8, 3], None, factors="i1 i2 i3"),
    case(aten.upsample_trilinear3d.vec, randn(1, 2, 2, 4, 3), [4, 4, 3], False, None, factors="i1 i3 i4"),
]


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_rule(case: Case) -> None:
    check_case(case)
