"""Ops that users might bring: of `torch.library`, unknown to this package."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tests.support.tiny import WIDTH, AttentionWithLoss

own = torch.ops.sptests


@torch.library.custom_op("sptests::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


def _rms_norm_back(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    along = (grad * weight * x).mean(-1, keepdim=True)
    return scale * (grad * weight - x * scale.square() * along), (grad * x * scale).flatten(0, -2).sum(0)


rms_norm.register_autograd(_rms_norm_back, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


@torch.library.custom_op("sptests::doubled", mutates_args=())
def doubled(x: Tensor, length: int) -> Tensor:
    """Twice a tensor whose second dim is ``length``: an argument holds a size."""
    assert x.shape[1] == length, f"{x.shape[1]} tokens, not {length}"
    return x * 2


@doubled.register_fake
def _(x: Tensor, length: int) -> Tensor:
    return torch.empty_like(x)


doubled.register_autograd(lambda ctx, grad: (grad * 2, None))


@torch.library.custom_op("sptests::eval_only", mutates_args=())
def eval_only(x: Tensor) -> Tensor:
    """Has no backward."""
    return x.sin()


@torch.library.custom_op("sptests::mixed_back", mutates_args=())
def mixed_back(x: Tensor) -> Tensor:
    """Forward is pointwise; the gradient of a row depends on the other rows."""
    return x * 3


@mixed_back.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


mixed_back.register_autograd(lambda ctx, grad: grad - grad.mean(0, keepdim=True))


@functools.cache
def made_for_the_page() -> None:
    """The ops that docs/extending.md speaks of."""

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight).clone()

    def unflattened(x: Tensor, batch: int, tokens: int) -> Tensor:
        return x.reshape(batch, tokens, x.shape[-1]).clone()

    library = torch.library.Library("mylib", "DEF")
    for schema, function in (
        ("rms_norm(Tensor x, Tensor weight) -> Tensor", normed),
        ("unflattened(Tensor x, SymInt batch, SymInt tokens) -> Tensor", unflattened),
    ):
        library.define(schema)
        library.impl(schema.split("(")[0], function, "CompositeImplicitAutograd")
    _LIBRARIES.append(library)


_LIBRARIES: list[torch.library.Library] = []  # an op is gone with its library


class Normed(AttentionWithLoss):
    """An op of the user's between attention and head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.Parameter(torch.rand(WIDTH) + 0.5)

    def between(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.norm)


class Doubled(AttentionWithLoss):
    def between(self, x: Tensor) -> Tensor:
        return doubled(x, x.shape[1])


def made(kind: type[AttentionWithLoss]) -> AttentionWithLoss:
    """In float64, the same at every call."""
    torch.manual_seed(0)
    return kind().double()
