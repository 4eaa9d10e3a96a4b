"""A lookup in a table that each head has for itself, as a step of mask programs."""

from __future__ import annotations

import torch
from torch import Tensor

from sptransform.ops.library import composite


@composite("lookup(Tensor table, Tensor index) -> Tensor")
def lookup(table: Tensor, index: Tensor) -> Tensor:
    """``table[h, index]`` for every head h.

    Args:
        table: [H, n], or [1, n] for all heads.
        index: whole numbers [.., 1, q, k], or with fewer dimensions; for a table of one row any shape.

    Returns:
        [.., H, q, k]; in the shape of ``index`` for a table of one row.
    """
    if table.shape[0] == 1:
        return table[0][index]
    return table[:, _of_all_heads(index)].movedim(0, -3)


def grad_of_table(grad: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """The gradient [H or 1, n] of the table, from that of the result."""
    num_heads, size = table.shape
    if num_heads > 1:
        grad, index = grad.movedim(-3, 0), _of_all_heads(index)
    # negative indices count from the end
    entries = index.reshape(-1).remainder(size)
    return grad.new_zeros(num_heads, size).index_add(1, entries, grad.reshape(num_heads, -1))


def _of_all_heads(index: Tensor) -> Tensor:
    """The index [.., q, k], which has no dimension for heads."""
    index = torch.atleast_2d(index)
    return index if index.dim() == 2 else index.squeeze(-3)
