"""Mistakes that users may make in what they bring, each of which runs without an error: for `verify` to find."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import sptransform
from sptransform import Context, Decision, OpRule, Pass, Sharded, Strategy
from sptransform.engine.strategy import Divide
from sptransform.graph.edit import emit_like
from sptransform.sharding.placement import I, Placement, R
from tests.support.tiny import WIDTH, AttentionWithLoss

aten = torch.ops.aten


@torch.library.custom_op("sptests::running_mean", mutates_args=())
def running_mean(x: Tensor, weight: Tensor) -> Tensor:
    """Of each token and all before it, scaled."""
    return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None] * weight


@running_mean.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


def _back(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    counts = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
    scaled = grad * weight / counts
    return scaled.flip(1).cumsum(1).flip(1), (grad * x.cumsum(1) / counts).sum((0, 1))


running_mean.register_autograd(_back, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))

# as if a token's result came from that token alone
WRONG_RULE = {running_mean: sptransform.rule("b s h, h -> b s h")}


class Running(AttentionWithLoss):
    """An op along the sequence, between attention and head."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.rand(WIDTH) + 0.5)

    def between(self, x: Tensor) -> Tensor:
        return running_mean(x, self.scale)


class ChangesLinear(Pass):
    """The base of passes that put something after the first linear."""

    requires = ensures = frozenset({"functional"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        linear = graph.find_nodes(op="call_function", target=aten.linear.default)[0]
        new = self.changed(linear.next, linear)
        linear.replace_all_uses_with(new, delete_user_cb=lambda user: user not in self.readers)

    readers: tuple[fx.Node, ...] = ()

    def changed(self, before: fx.Node, linear: fx.Node) -> fx.Node:
        raise NotImplementedError


class Larger(ChangesLinear):
    """x -> 1.0001 x"""

    def changed(self, before: fx.Node, linear: fx.Node) -> fx.Node:
        self.readers = ((new := emit_like(before, aten.mul.Scalar, linear, 1 + 1e-4)),)
        return new


class TwiceTheGradient(ChangesLinear):
    """x -> 2 x - x.detach(): the same value, and twice the gradient."""

    def changed(self, before: fx.Node, linear: fx.Node) -> fx.Node:
        constant = emit_like(before, aten.detach.default, linear)
        twice = emit_like(before, aten.mul.Scalar, linear, 2.0)
        self.readers = (constant, twice)
        return emit_like(before, aten.sub.Tensor, twice, constant)


@dataclass(frozen=True)
class OwnKeys(Sharded):
    """Each rank attends to its own keys, and takes what comes out for the whole."""

    def demand(self, rule: OpRule | None, index: int) -> Placement:
        found = super().demand(rule, index)
        return I if found == R else found

    def outcome(self, rule: OpRule | None, index: int) -> Placement:
        return I

    def is_allowed(self, rule: OpRule | None) -> bool:
        return True


class KeysStay(Strategy):
    """A strategy whose decision is wrong."""

    def place_attention(self, rule: OpRule, num_ranks: int, divide: Divide) -> Decision:
        keys = rule.roles["keys"]
        return OwnKeys(keys, divide(keys))
