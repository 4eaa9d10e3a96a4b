"""A product of each row with the matrix of its group, as experts compute it: ``rows[i // times] @ weight[group[i]]``.

Kernels of such products take rows that are sorted by group. Here rows are sorted for the kernel, and its result is put
back in order, so that whoever cuts, gathers or reads these tensors knows of no order but that of the rows. Inductor
moves rows where it reads and writes them anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sptransform.ops.library import composite


class _Reordered(torch.autograd.Function):
    """``x[order // times]``. Its gradient is read in the inverse order, where torch would add row to row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, times: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.times = times
        return x[order if times == 1 else order // times]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (inverse,) = ctx.saved_tensors
        rows = grad[inverse]
        return rows if ctx.times == 1 else rows.unflatten(0, (-1, ctx.times)).sum(1), None, None, None


@composite("grouped_product(Tensor rows, Tensor weight, Tensor group, int times, str kernel) -> Tensor")
def grouped_product(rows: Tensor, weight: Tensor, group: Tensor, times: int, kernel: str) -> Tensor:
    """The product of every row with the matrices of ``times`` groups.

    Args:
        rows: [n, k].
        weight: [groups, k, f].
        group: whole numbers [n * times], from 0 to below the number of groups: those of one row follow each other.
        times: how many groups a row is in.
        kernel: the op that multiplies sorted rows, as ``library.name``: ``op(rows, weight, ends of groups)``.

    Returns:
        [n * times, f].
    """
    groups, order = group.sort(stable=True)
    inverse = torch.scatter(order, 0, order, torch.arange(order.shape[0], device=order.device))
    numbers = torch.arange(weight.shape[0], dtype=groups.dtype, device=groups.device)
    ends = torch.searchsorted(groups, numbers, right=True, out_int32=True)
    library, name = kernel.split(".")
    product = getattr(getattr(torch.ops, library), name)(_Reordered.apply(rows, order, inverse, times), weight, ends)
    return _Reordered.apply(product, inverse, order, 1)
