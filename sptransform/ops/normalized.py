"""A norm with a given mean and variance, which keeps nothing for its backward but its operands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sptransform.ops.library import composite


class _Normalized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, mean, var, weight, bias)
        ctx.eps = eps
        return ((x - mean) * (var + eps).rsqrt() * weight + bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, mean, var, weight, bias = ctx.saved_tensors
        scale = (var + ctx.eps).rsqrt()
        centred, of_x = x - mean, grad * weight * scale
        of_weight = (grad * centred * scale).sum_to_size(weight.shape)
        of_var = (of_x * centred).sum_to_size(var.shape) * scale.square() / -2
        return (
            of_x.to(x.dtype),
            -of_x.sum_to_size(mean.shape),
            of_var,
            of_weight.to(weight.dtype),
            grad.sum_to_size(bias.shape).to(bias.dtype),
            None,
        )


@composite("normalized(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps) -> Tensor")
def normalized(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias``, all of which broadcast to ``x``."""
    weight = torch.ones_like(mean) if weight is None else weight
    bias = torch.zeros_like(mean) if bias is None else bias
    return _Normalized.apply(x, mean, var, weight, bias, eps)
