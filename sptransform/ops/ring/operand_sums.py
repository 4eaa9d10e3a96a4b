"""Gradients of the operands of a mask program, summed over the blocks that one rank computes.

A sum [.., m, n] has the shape of its operand, of which a block reads rows and some intervals of columns.
"""

from __future__ import annotations

from torch import Tensor

from sptransform.ops.library import primitive


@primitive(
    "add_to_operand(Tensor total, Tensor part, int start, int[] columns) -> Tensor",
    fake=lambda total, part, start, columns: total.new_empty(total.shape),
)
def add_to_operand(total: Tensor, part: Tensor, start: int, columns: list[int]) -> Tensor:
    """``total`` with ``part`` added to its rows from ``start`` on, in the intervals ``lo, hi, ..`` of columns."""
    total = total.clone()
    add_to_operand_(total, part, start, columns)
    return total


def add_to_operand_(total: Tensor, part: Tensor, start: int, columns: list[int]) -> None:
    """:func:`add_to_operand` in place."""
    rows = total.narrow(-2, start, part.shape[-2])
    sizes = [hi - lo for lo, hi in zip(columns[::2], columns[1::2], strict=True)]
    for lo, piece in zip(columns[::2], part.split(sizes, -1), strict=True):
        rows.narrow(-1, lo, piece.shape[-1]).add_(piece)
