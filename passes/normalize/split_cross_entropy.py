"""Write cross-entropy as a log-softmax and a lookup of the labels' log-probabilities.

Before: ``%loss = aten.cross_entropy_loss(%logits, %labels, None, 2)``; after::

    %logs = aten.log_softmax(%logits, 1)
    %loss = aten.nll_loss_nd(%logs, %labels, None, 2)

Both run on a shard of the vocabulary: the first combines the ranks' shards itself, the second gives a pending sum.

1. Class indices: as above. With label smoothing e and C classes, ``1 - e`` times that, plus ``e / C`` times the sum of
   the losses of all classes.
2. Class probabilities: minus the sum of the log-probabilities times the smoothed probabilities.
3. Under autocast, floating-point operands are cast to the dtype of the loss.
4. Means were split before, so the reduction is a sum or none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow
from sptransform.graph.calls import op_call
from sptransform.graph.edit import emit_like, succeed
from sptransform.op_rules.loss import MEAN, NONE

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitCrossEntropy(Pass):
    requires = frozenset({"functional"})
    ensures = frozenset({"functional"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        if not context.strategy.shards_weights:
            return
        for node in graph.find_nodes(op="call_function", target=aten.cross_entropy_loss.default):
            if op_call(node).argument("reduction") != MEAN:
                succeed(node, _Split(node).loss())


class _Split:
    """Emits the nodes that replace ``node``, in front of it."""

    def __init__(self, node: fx.Node) -> None:
        self._node, self._call = node, op_call(node)
        self._smoothing, self._reduction = (self._call.argument(name) for name in ("label_smoothing", "reduction"))
        logits, self._target, *weight = map(self._converted, dataflow.operands(node))
        self._weight = weight[0] if weight else None
        shape = dataflow.shape(logits)
        self._dim = min(len(shape) - 1, 1)
        self._num_classes = shape[self._dim]
        self._logs = self._emit(aten.log_softmax.int, logits, self._dim)

    def _emit(self, target: Any, *args: Any) -> fx.Node:
        return emit_like(self._node, target, *args)

    def _converted(self, x: fx.Node) -> fx.Node:
        value, dtype = dataflow.value(x), dataflow.value(self._node).dtype
        return x if value.dtype == dtype or not value.is_floating_point() else self._emit(aten.to.dtype, x, dtype)

    def loss(self) -> fx.Node:
        if dataflow.value(self._target).is_floating_point():
            return self._summed(self._emit(aten.mul.Tensor, self._logs, self._smoothed(self._target)))
        ignored = self._call.argument("ignore_index")
        rest = (self._weight, self._reduction, ignored)
        found = self._emit(aten.nll_loss_nd.default, self._logs, self._target, *rest)
        if self._smoothing == 0.0:
            return found
        is_valid = self._emit(aten.unsqueeze.default, self._emit(aten.ne.Scalar, self._target, ignored), self._dim)
        every = self._summed(self._emit(aten.where.ScalarOther, is_valid, self._logs, 0.0))
        return self._emit(
            aten.add.Tensor,
            self._emit(aten.mul.Scalar, found, 1.0 - self._smoothing),
            self._emit(aten.div.Scalar, self._emit(aten.mul.Scalar, every, self._smoothing), self._num_classes),
        )

    def _smoothed(self, target: fx.Node) -> fx.Node:
        if self._smoothing == 0.0:
            return target
        kept = self._emit(aten.mul.Scalar, target, 1.0 - self._smoothing)
        return self._emit(aten.add.Scalar, kept, self._smoothing / self._num_classes)

    def _summed(self, terms: fx.Node) -> fx.Node:
        """Minus the weighted sum of ``terms`` over classes; over all other dims too, unless the reduction is none."""
        if self._weight is not None:
            ndim = len(dataflow.shape(terms))
            weight = self._emit(aten.view.default, self._weight, [-1] + [1] * (ndim - self._dim - 1))
            terms = self._emit(aten.mul.Tensor, terms, weight)
        if self._reduction == NONE:
            return self._emit(aten.neg.default, self._emit(aten.sum.dim_IntList, terms, [self._dim]))
        return self._emit(aten.neg.default, self._emit(aten.sum.default, terms))
