"""Mean and variance over dimensions of which one is cut: ranks add up sums, then squares of what is left.

As in synchronised batch norms, but squares are of differences from the mean of all ranks, so that no digits are lost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sptransform.ops.communication import collectives
from sptransform.ops.library import composite


class _VarMean(torch.autograd.Function):
    """Every rank has the results, and their whole gradients: nothing is sent backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: list[int], count: int, correction: float, group: str) -> Any:
        wide = x.float() if x.dtype.itemsize < 4 else x
        mean = collectives.all_reduce(wide.sum(dims, keepdim=True), group) / count
        squares = (wide - mean).square().sum(dims, keepdim=True)
        divisor = max(count - correction, 0)
        ctx.save_for_backward(x, mean)
        ctx.count, ctx.divisor = count, divisor
        return (collectives.all_reduce(squares, group) / divisor).to(x.dtype), mean.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, of_var: Tensor, of_mean: Tensor) -> tuple[Any, ...]:
        x, mean = ctx.saved_tensors
        return (of_mean / ctx.count + of_var * 2 * (x - mean) / ctx.divisor).to(x.dtype), None, None, None, None


@composite(
    "joined_var_mean(Tensor x, int[] dims, bool keepdim, SymInt count, float correction, int num_ranks, "
    "str group_name) -> (Tensor, Tensor)"
)
def joined_var_mean(
    x: Tensor, dims: list[int], keepdim: bool, count: int, correction: float, num_ranks: int, group_name: str
) -> tuple[Tensor, Tensor]:
    """``var_mean`` over ``dims``, which have ``count`` entries on all ranks together."""
    found = _VarMean.apply(x, dims, count, correction, group_name)
    return found if keepdim else tuple(each.squeeze(dims) for each in found)


@composite(
    "joined_var(Tensor x, int[] dims, bool keepdim, SymInt count, float correction, int num_ranks, str group_name) "
    "-> Tensor"
)
def joined_var(
    x: Tensor, dims: list[int], keepdim: bool, count: int, correction: float, num_ranks: int, group_name: str
) -> Tensor:
    return joined_var_mean(x, dims, keepdim, count, correction, num_ranks, group_name)[0]


@composite(
    "joined_std(Tensor x, int[] dims, bool keepdim, SymInt count, float correction, int num_ranks, str group_name) "
    "-> Tensor"
)
def joined_std(
    x: Tensor, dims: list[int], keepdim: bool, count: int, correction: float, num_ranks: int, group_name: str
) -> Tensor:
    var = joined_var(x, dims, keepdim, count, correction, num_ranks, group_name)
    is_zero = var == 0  # the gradient of what is constant is zero, as torch has it, not that of the root
    return var.masked_fill(is_zero, 1).sqrt().masked_fill(is_zero, 0)
