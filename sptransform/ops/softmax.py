"""Softmax along a dimension of which each rank has a part: maximum and sum are reduced over the ranks.

As the vocabulary-parallel cross-entropy of Megatron-LM (Shoeybi et al., arXiv 1909.08053, §3): no rank has all logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sptransform.ops import collectives
from sptransform.ops.library import composite


def _exponentials(x: Tensor, dim: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` less the maximum, its exponential, and the sum of that over all ranks, in a dtype that holds sums."""
    x = x.float() if x.dtype.itemsize < 4 else x
    largest = x.amax(dim, keepdim=True) if x.shape[dim] else x.new_full(_reduced(x, dim), -torch.inf)
    shifted = x - collectives.all_reduce(largest, group, "max")
    powers = shifted.exp()
    return shifted, powers, collectives.all_reduce(powers.sum(dim, keepdim=True), group)


def _reduced(x: Tensor, dim: int) -> list[int]:
    return [1 if d == dim % x.ndim else size for d, size in enumerate(x.shape)]


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: str) -> Tensor:
        ctx.dim, ctx.group = dim, group
        _, powers, total = _exponentials(x, dim, group)
        y = (powers / total).to(x.dtype)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (y,) = ctx.saved_tensors
        return _along(lambda y, g, total: y * (g - total), y, grad, grad * y, ctx), None, None


class _LogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: str) -> Tensor:
        ctx.dim, ctx.group = dim, group
        shifted, _, total = _exponentials(x, dim, group)
        y = (shifted - total.log()).to(x.dtype)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (y,) = ctx.saved_tensors
        return _along(lambda y, g, total: g - y.exp() * total, y, grad, grad, ctx), None, None


def _along(gradient: Callable[..., Tensor], y: Tensor, grad: Tensor, terms: Tensor, ctx: Any) -> Tensor:
    """The gradient, given ``terms`` summed over all ranks; computed in a dtype that holds sums."""
    dtype = torch.float32 if y.dtype.itemsize < 4 else y.dtype
    total = collectives.all_reduce(terms.to(dtype).sum(ctx.dim, keepdim=True), ctx.group)
    return gradient(y.to(dtype), grad.to(dtype), total).to(y.dtype)


@composite("softmax(Tensor x, int dim, int num_ranks, str group_name) -> Tensor")
def softmax(x: Tensor, dim: int, num_ranks: int, group_name: str) -> Tensor:
    return _Softmax.apply(x, dim, group_name)


@composite("log_softmax(Tensor x, int dim, int num_ranks, str group_name) -> Tensor")
def log_softmax(x: Tensor, dim: int, num_ranks: int, group_name: str) -> Tensor:
    return _LogSoftmax.apply(x, dim, group_name)
