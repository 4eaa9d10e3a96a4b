"""What an input holds before the graph writes it, for the backward: compilers compute again, from an input, what they
need not keep, and would find what was written. They cannot look into a copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sptransform.ops.library import composite, primitive


@primitive("copied(Tensor x) -> Tensor", fake=torch.empty_like)
def copied(x: Tensor) -> Tensor:
    return x.clone()


class _BeforeWrite(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.ops.sptransform.copied(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@composite("before_write(Tensor x) -> Tensor")
def before_write(x: Tensor) -> Tensor:
    """A copy of ``x``, with its gradient."""
    return _BeforeWrite.apply(x)
