"""A tensor whose value was changed where autograd does not look: under ``no_grad``, through ``detach`` or ``data``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sptransform.ops.library import composite


class _WithValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@composite("with_value(Tensor x, Tensor value) -> Tensor")
def with_value(x: Tensor, value: Tensor) -> Tensor:
    """``value``, of the shape and dtype of ``x``, with the gradient of ``x``."""
    return _WithValue.apply(x, value)
