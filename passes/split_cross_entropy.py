"""Write cross-entropy as log-probabilities and the lookup of the labels' ones.

Before: ``%loss = aten.cross_entropy_loss(%logits, %labels, None, 2)``; after::

    %logs = aten.log_softmax(%logits, 1)
    %loss = aten.nll_loss_nd(%logs, %labels, None, 2)

Both run on a part of the vocabulary: the first joins the ranks' parts itself, the second gives a pending sum.

1. With class indices and without label smoothing; other forms need all logits of a token.
2. A mean was split before: what is left sums, or reduces nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from sptransform import annotations
from sptransform.op_rules.loss import MEAN
from sptransform.pass_manager import Context, Pass
from sptransform.rewriter import emit_like, succeed
from sptransform.rules import OpCall

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitCrossEntropy(Pass):
    requires = frozenset({"functional"})
    ensures = frozenset({"functional"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        if not context.strategy.shards_weights:
            return
        for node in graph.find_nodes(op="call_function", target=aten.cross_entropy_loss.default):
            call = OpCall.of_node(node)
            logits, labels, *weight = annotations.operands(node)
            is_sum = call.argument("reduction") != MEAN and call.argument("label_smoothing") == 0.0
            if is_sum and not annotations.value(labels).is_floating_point():
                logs = emit_like(node, aten.log_softmax.int, logits, min(len(annotations.shape(logits)) - 1, 1))
                rest = (*(weight or [None]), call.argument("reduction"), call.argument("ignore_index"))
                succeed(node, emit_like(node, aten.nll_loss_nd.default, logs, labels, *rest))
