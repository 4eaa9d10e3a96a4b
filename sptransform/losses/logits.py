"""From the product that makes logits to what reads them: ops on each logit alone, and ops that move tokens.

    %product = aten.linear(%x, %weight)              # [tokens, classes]
    %capped = aten.mul.Tensor(aten.tanh(%product), 30.0)
    %shifted = aten.slice.Tensor(%capped, 1, 0, -1)
    %rows = aten.view(%shifted, [-1, %classes])

Ops on each logit are steps of a mask program, whose operand %0 is the product. What moves tokens can as well move the
rows of ``x``, and what takes a range of classes can take these rows of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import fx

from sptransform.graph import dataflow, notes
from sptransform.graph.calls import rule_at
from sptransform.graph.edit import emit_like
from sptransform.op_rules.mask_ops import CONVERT, RETYPED
from sptransform.op_rules.rearrangement import RESHAPES
from sptransform.ops.mask_gradients import without_gradient
from sptransform.ops.mask_program import MaskProgram, Ref, Step, is_elementwise
from sptransform.ops.ring.kernels.interface import compute_dtype
from sptransform.rules.rule import OpRule, map_nodes
from sptransform.rules.table import RuleTable
from sptransform.sharding.sizes import Size

aten = torch.ops.aten

_MOVES = RESHAPES | {
    aten.mT.default,
    aten.permute.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.squeeze.dim,
    aten.t.default,
    aten.transpose.int,
    aten.unsqueeze.default,
}


@dataclass(frozen=True)
class Product:
    """A contraction ``[.., d] x weight -> [.., classes]``."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    is_transposed: bool  # the weight is [d, classes]


def product_at(node: fx.Node, rules: RuleTable) -> Product | None:
    """The node as such a product, which its rule says; None if it is something else."""
    rule = rule_at(node, rules) if dataflow.handles_tensors(node) else None
    if rule is None or not rule.heavy or rule.roles or len(rule.results) != 1 or len(rule.operands) not in (2, 3):
        return None
    (*tokens, contracted), weight, *bias = rule.operands
    (*rows, classes), *_ = rule.results
    if not tokens or tokens != rows or len(contracted) != 1 or len(classes) != 1 or contracted == classes:
        return None
    if set(weight) != {contracted, classes} or len(weight) != 2:
        return None
    if bias and (node.target is not aten.linear.default or bias != [(classes,)]):
        return None
    return Product(node, *(*dataflow.operands(node), None)[:3], is_transposed=weight[0] == contracted)


@dataclass(frozen=True)
class _Column:
    """Stands in a step for the index-th column."""

    index: int


_LOGITS = object()  # stands in a step for the logits so far


@dataclass(frozen=True)
class Logits:
    """A tensor whose entries are logits.

    Attributes:
        node: that tensor.
        dim: its dimension of classes.
        steps: the ops on each logit, in order, each with the dtype of its result.
        columns: their operands, which have one entry for each class, or one.
        moves: the ops that moved tokens, in order, with the dimension of classes after each.
        pieces: the slices of classes, in order.
    """

    product: Product
    node: fx.Node
    dim: int
    steps: tuple[tuple[Step, torch.dtype], ...] = ()
    columns: tuple[fx.Node, ...] = ()
    moves: tuple[tuple[fx.Node, int], ...] = ()
    pieces: tuple[fx.Node, ...] = ()

    @property
    def is_last(self) -> bool:
        """Whether classes are the last dimension."""
        return self.dim == len(dataflow.shape(self.node)) - 1

    @cached_property
    def _needed(self) -> tuple[tuple[Step, torch.dtype], ...]:
        """The steps without a last conversion to the dtype in which the op computes anyway."""
        *before, (last, dtype) = (None, dataflow.value(self.product.node).dtype), *self.steps
        if before and last.target is CONVERT and dtype == compute_dtype(before[-1][1]):
            return self.steps[:-1]
        return self.steps

    @property
    def tokens(self) -> tuple[Any, ...]:
        """What determines which tokens these are, in which order; and what was made of their logits."""
        moved = [
            (node.target, str(node.args[1:]), str(node.kwargs), str(dataflow.shape(node.args[0])))
            for node, _ in self.moves
            if node.target not in RESHAPES or not self.is_last
        ]
        return self._needed, self.columns, tuple(moved), self.pieces

    def after(self, user: fx.Node, rules: RuleTable) -> Logits | None:
        """What ``user`` makes of them; None if that is something else."""
        if _num_uses(user, self.node) != 1:
            return None
        if notes.region_of(user).grad_enabled != notes.region_of(self.product.node).grad_enabled:
            return None
        if is_elementwise(user.target) and user.target not in RETYPED:
            return self._computed(user)
        if user.args[:1] != (self.node,):  # only its dtype is read
            return None
        if user.target in RETYPED and user.target is not aten.detach.default:
            same_device = dataflow.value(user).device == dataflow.value(self.node).device
            return self.converted(dataflow.value(user).dtype, user) if same_device else None
        return self._moved(user, rule_at(user, rules)) if user.target in _MOVES else None

    def converted(self, dtype: torch.dtype, node: fx.Node | None = None) -> Logits:
        """The same in another dtype."""
        is_same = dtype == dataflow.value(self.node).dtype
        steps = self.steps if is_same else (*self.steps, (Step(CONVERT, (_LOGITS, dtype)), dtype))
        return replace(self, node=node or self.node, steps=steps)

    def _moved(self, user: fx.Node, rule: OpRule | None) -> Logits | None:
        if rule is None or len(rule.operands) != 1 or len(rule.operands[0][self.dim]) != 1:
            return None
        (classes,) = rule.operands[0][self.dim]
        places = [dim for dim, factors in enumerate(rule.results[0]) if factors == (classes,)]
        if not places:
            return None
        if any(factor == classes for _, _, factor in rule.resize):
            return None if self.columns else replace(self, node=user, pieces=(*self.pieces, user))
        return replace(self, node=user, dim=places[0], moves=(*self.moves, (user, places[0])))

    def _computed(self, user: fx.Node) -> Logits | None:
        shape = dataflow.shape(self.node)
        if dataflow.shape(user) != shape:
            return None
        columns = list(self.columns)

        def argument(x: Any) -> Any:
            if x is self.node:
                return _LOGITS
            if isinstance(x, fx.Node):
                columns.append(x)
                return _Column(len(columns) - 1)
            return x

        args, kwargs = map_nodes((tuple(user.args), dict(user.kwargs)), argument)
        if not all(self._is_column(x) for x in columns[len(self.columns) :]):
            return None
        step = Step(user.target, args, tuple(kwargs.items())), dataflow.value(user).dtype
        return replace(self, node=user, steps=(*self.steps, step), columns=tuple(columns))

    def _is_column(self, x: fx.Node) -> bool:
        if not dataflow.is_tensor(x) or notes.note(x).differentiable:
            return False
        shape, own = dataflow.shape(self.node), dataflow.shape(x)
        behind = len(shape) - self.dim
        return prod(own) == 1 or (len(own) >= behind and prod(own) == own[-behind] == shape[self.dim])

    def program(self) -> MaskProgram | None:
        """The steps as a program; None if it would compute in other dtypes (autocast), or passes no gradient."""
        first = 1 + len(self.columns)

        def refer(x: Any, at: int) -> Any:
            if x is _LOGITS:
                return Ref(first + at - 1 if at else 0)
            return Ref(1 + x.index) if isinstance(x, _Column) else x

        steps = [
            Step(step.target, tuple(refer(x, at) for x in step.args), tuple((k, refer(x, at)) for k, x in step.kwargs))
            for at, (step, _) in enumerate(self._needed)
        ]
        program = MaskProgram(first, tuple(steps))
        if without_gradient(program, [0]) is not None:
            return None
        with dataflow.fake_mode(self.node.graph), torch.no_grad():
            operands = [dataflow.value(x).new_empty(0) for x in (self.product.node, *self.columns)]
            found = [x.dtype for x in program.values(operands)[first:]]
        return program if found == [dtype for _, dtype in self._needed] else None

    def emit_operands(self, at: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None, list[fx.Node]]:
        """x with the tokens of these logits, weight, bias and columns; emitted in front of ``at``."""
        dtype = dataflow.value(self.product.node).dtype

        def cast(x: fx.Node) -> fx.Node:
            return x if dataflow.value(x).dtype == dtype else emit_like(at, CONVERT, x, dtype)

        x, weight = cast(self.product.x), cast(self.product.weight)
        bias = None if self.product.bias is None else cast(self.product.bias)
        if self.product.is_transposed:
            weight = emit_like(at, aten.transpose.int, weight, 0, 1)
        for piece in self.pieces:
            _, _, *bounds = piece.args
            weight = emit_like(at, aten.slice.Tensor, weight, 0, *bounds)
            bias = None if bias is None else emit_like(at, aten.slice.Tensor, bias, 0, *bounds)
        width = dataflow.shape(x)[-1]
        for move, dim in self.moves:
            x = _same_move(x, move, dim, width, at)
        if not self.is_last:
            order = [d for d in range(len(dataflow.shape(self.node))) if d != self.dim]
            x = emit_like(at, aten.permute.default, x, [*order, self.dim])
        columns = [emit_like(at, aten.reshape.default, column, [-1]) for column in self.columns]
        return x, weight, bias, columns


def _same_move(x: fx.Node, move: fx.Node, dim: int, width: Size, at: fx.Node) -> fx.Node:
    """``move`` of a tensor that has ``width`` entries where the logits have classes."""
    if move.target not in RESHAPES:
        return emit_like(at, move.target, x, *move.args[1:], **move.kwargs)
    shape = list(dataflow.shape(move))
    shape[dim] = width
    return emit_like(at, aten.reshape.default, x, shape)


def _num_uses(user: fx.Node, node: fx.Node) -> int:
    found: list[fx.Node] = []
    fx.map_arg((user.args, user.kwargs), found.append)
    return found.count(node)


def all_logits(product: Product, rules: RuleTable) -> Iterator[tuple[fx.Node, Logits]]:
    """(user, the logits that it reads), of every user that makes something else of them, or returns them."""
    waiting = [Logits(product, product.node, len(dataflow.shape(product.node)) - 1)]
    while waiting:
        logits = waiting.pop()
        for user in logits.node.users:
            made = None if user.op == "output" else logits.after(user, rules)
            if made is None:
                yield user, logits
            else:
                waiting.append(made)
