"""What a mask program whose operands are data shows inside of a packed document."""

from __future__ import annotations

import pytest

from sptransform.masks.bands import Band
from sptransform.masks.in_documents import band_in_documents
from sptransform.ops.mask_program import parse


@pytest.mark.parametrize(
    ("program", "num_rows", "band", "is_known"),
    [
        ("%2 = eq.Tensor(%0, %1)", 1, Band(), True),
        ("%4 = le.Tensor(%2, %0); %5 = eq.Tensor(%1, %3); %6 = logical_and(%4, %5)", 2, Band(nearest=0), True),
        ("%2 = gt.Tensor(%0, %1)", 1, Band(nearest=1), True),
        ("%2 = lt.Tensor(%0, %1)", 1, Band(farthest=-1), True),
        ("%2 = ge.Tensor(%1, %0)", 1, Band(farthest=0), True),
        # not data of a query and a key
        ("%0", 0, Band(), False),
        ("%3 = le.Tensor(%2, %0); %4 = logical_and(%3, %1)", 1, Band(nearest=0), False),
        ("%2 = le.Tensor(%0, %1)", 0, Band(), False),
        ("%1 = le.Scalar(%0, 3)", 0, Band(), False),
        ("%2 = ne.Tensor(%0, %1)", 1, Band(), False),
        ("%2 = eq.Tensor(%0, %1); %3 = logical_not(%2)", 1, Band(), False),
        ("%3 = eq.Tensor(%0, %1); %4 = where.ScalarOther(%3, %2, -inf)", 1, Band(), False),
    ],
)
def test_band(program: str, num_rows: int, band: Band, is_known: bool) -> None:
    assert band_in_documents(parse(program), num_rows) == (band, is_known)
