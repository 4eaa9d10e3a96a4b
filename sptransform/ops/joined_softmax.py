"""Softmax, log-softmax and logsumexp along a sharded dimension: maximum and sum are all-reduced over the ranks.

As in the vocabulary-parallel cross-entropy of Megatron-LM (Shoeybi et al., arXiv 1909.08053, §3), no rank has all
logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sptransform.ops.communication import collectives
from sptransform.ops.library import composite


def _wide(x: Tensor) -> Tensor:
    """``x`` in the dtype in which torch accumulates sums."""
    return x.float() if x.dtype.itemsize < 4 else x


def _exponentials(x: Tensor, dim: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` minus the global maximum, its exponential, and the global sum of that."""
    x = _wide(x)
    # a rank with an empty part has no maximum; -inf is neutral
    largest = x.amax(dim, keepdim=True) if x.shape[dim] else x.sum(dim, keepdim=True) - torch.inf
    shifted = x - collectives.all_reduce(largest, group, "max")
    powers = shifted.exp()
    return shifted, powers, _total(powers, dim, group)


def _total(x: Tensor, dim: int, group: str) -> Tensor:
    return collectives.all_reduce(x.sum(dim, keepdim=True), group)


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
        (y,) = map(_wide, ctx.saved_tensors)
        weighted = _wide(grad) * y
        return (weighted - y * _total(weighted, ctx.dim, ctx.group)).to(grad.dtype), None, None


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
        (y,) = map(_wide, ctx.saved_tensors)
        wide = _wide(grad)
        return (wide - y.exp() * _total(wide, ctx.dim, ctx.group)).to(grad.dtype), None, None


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: str) -> Tensor:
        wide = _wide(x)
        largest = wide.amax(dim, keepdim=True) if x.shape[dim] else wide.sum(dim, keepdim=True) - torch.inf
        largest = collectives.all_reduce(largest, group, "max")
        largest = largest.masked_fill(largest.isinf(), 0)  # an infinite sum is exact without it, and has no nan
        total = largest + _total((wide - largest).exp(), dim, group).log()
        ctx.save_for_backward(x, total)
        return total.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, total = ctx.saved_tensors
        return (_wide(grad) * (_wide(x) - total).exp()).to(x.dtype), None, None


@composite("softmax(Tensor x, int dim, ScalarType dtype, int num_ranks, str group_name) -> Tensor")
def softmax(x: Tensor, dim: int, dtype: torch.dtype, num_ranks: int, group_name: str) -> Tensor:
    return _Softmax.apply(x.to(dtype), dim, group_name)


@composite("log_softmax(Tensor x, int dim, ScalarType dtype, int num_ranks, str group_name) -> Tensor")
def log_softmax(x: Tensor, dim: int, dtype: torch.dtype, num_ranks: int, group_name: str) -> Tensor:
    return _LogSoftmax.apply(x.to(dtype), dim, group_name)


@composite(
    "logsumexp(Tensor x, int dim, bool keepdim, ScalarType dtype, int num_ranks, str group_name) -> Tensor",
)
def logsumexp(x: Tensor, dim: int, keepdim: bool, dtype: torch.dtype, num_ranks: int, group_name: str) -> Tensor:
    """The result, and its gradient, are whole on every rank."""
    found = _LogSumExp.apply(x.to(dtype), dim, group_name)
    return found if keepdim else found.squeeze(dim)
