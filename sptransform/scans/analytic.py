"""Computes a region of the graph on numbers, where it is an analytic function of what varies in it.

Two analytic functions that agree at a random point are the same, but for a chance of zero. So what a region computes is
compared with a definition on random numbers, and how a model writes it does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from sptransform.graph import dataflow, notes
from sptransform.graph.reruns import arguments_on_cpu

aten = torch.ops.aten

CONVERSIONS = {aten._to_copy.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout}

# in whatever varies; masks and other arguments are constants
ANALYTIC = {
    aten.add.Scalar,
    aten.add.Tensor,
    aten.alias.default,
    aten.cat.default,
    aten.clone.default,
    aten.constant_pad_nd.default,
    aten.contiguous.default,
    aten.cumsum.default,
    aten.exp.default,
    aten.expand.default,
    aten.flatten.using_ints,
    aten.flip.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.movedim.int,
    aten.mul.Scalar,
    aten.mul.Tensor,
    aten.neg.default,
    aten.pad.default,
    aten.permute.default,
    aten.rsub.Scalar,
    aten.slice.Tensor,
    aten.squeeze.dim,
    aten.stack.default,
    aten.sub.Scalar,
    aten.sub.Tensor,
    aten.transpose.int,
    aten.tril.default,
    aten.triu.default,
    aten.unsqueeze.default,
    aten.where.ScalarOther,
    aten.where.self,
}


class NotAnalyticError(Exception):
    """A node depends on something else, or by other ops; or its gradient does not reach what it depends on."""


class Region:
    """Computes nodes from the values ``given`` for some; other inputs must be constants.

    Precision is not converted: what varies stays as exact as it is given.
    """

    def __init__(self, given: Mapping[fx.Node, Tensor]) -> None:
        self._varying = dict(given)
        self._constant: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        if node in self._varying:
            return self._varying[node]
        if node not in self._constant:
            self._compute(node)
        return self._varying[node] if node in self._varying else self._constant[node]

    def _compute(self, node: fx.Node) -> None:
        if node.op != "call_function" or not dataflow.is_op(node.target) or dataflow.writes(node):
            raise NotAnalyticError
        values = {x: self.value(x) for x in node.all_input_nodes}
        varying = [x for x in values if x in self._varying]
        if not varying:
            if torch.Tag.nondeterministic_seeded in node.target.tags:
                raise NotAnalyticError
            self._constant[node] = self._run(node, values)
            return
        # whole numbers are rounded, and what is detached has the value alone
        if not dataflow.value(node).is_floating_point() or not notes.passes_gradients(node):
            raise NotAnalyticError
        if node.target in CONVERSIONS:
            self._varying[node] = values[varying[0]]
        elif node.target in ANALYTIC:
            self._varying[node] = self._run(node, values)
        else:
            raise NotAnalyticError

    def _run(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        args, kwargs = arguments_on_cpu(node, values)
        if node.target is aten.expand.default and node.args[0] in self._varying:
            args = (args[0], _grown(dataflow.shape(node.args[0]), args[1]))
        return node.target(*args, **kwargs)


def _grown(shape: tuple[Any, ...], sizes: list[int]) -> list[int]:
    """The sizes of an ``expand`` that only say which dimensions grow: the others may have any size."""
    new = len(sizes) - len(shape)
    return [*sizes[:new], *(-1 if size == own else size for size, own in zip(sizes[new:], shape, strict=True))]
