"""Write a loss averaged over its elements as a sum and a division by the global count.

Before: ``%loss = aten.cross_entropy_loss(%logits, %labels)``; after::

    %total = aten.cross_entropy_loss(%logits, %labels, None, 2)
    %valid = aten.sum(aten.ne(%labels, -100))
    %loss  = aten.div(%total, %valid)

so that each shard contributes its sum, and no rank divides by its local count.

1. Cross-entropy and NLL with class indices count the labels that are not ``ignore_index``, each with its class weight.
2. Cross-entropy with class probabilities counts every position.
3. Losses that are pointwise before their reduction count every element.
4. A 16-bit loss is summed in float32, as one device does to take its mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow
from sptransform.graph.calls import op_call
from sptransform.graph.edit import emit_like, succeed
from sptransform.op_rules.loss import MEAN, NONE, SUM
from sptransform.rules.rule import OpCall
from sptransform.sharding.sizes import Size, broadcast

aten = torch.ops.aten


def _count_labels(node: fx.Node, call: OpCall) -> fx.Node | Size:
    logits, labels = dataflow.operands(node)[:2]
    shape = dataflow.shape(logits)
    if dataflow.value(labels).is_floating_point():
        return prod(size for dim, size in enumerate(shape) if dim != (1 if len(shape) > 1 else 0))
    valid = emit_like(node, aten.ne.Scalar, labels, call.argument("ignore_index"))
    weight = call.operand("weight")
    if weight is None:
        return emit_like(node, aten.sum.default, valid)
    classes = emit_like(node, aten.mul.Tensor, labels, valid)
    weights = emit_like(node, aten.index.Tensor, dataflow.operands(node)[weight], [classes])
    return emit_like(node, aten.sum.default, emit_like(node, aten.mul.Tensor, weights, valid))


def _count_elements(node: fx.Node, call: OpCall) -> Size:
    return prod(broadcast(*call.operand_shapes) or ())


_COUNTS: dict[object, Callable[[fx.Node, OpCall], fx.Node | Size]] = {
    aten.binary_cross_entropy_with_logits.default: _count_elements,
    aten.cross_entropy_loss.default: _count_labels,
    aten.huber_loss.default: _count_elements,
    aten.kl_div.default: _count_elements,
    aten.l1_loss.default: _count_elements,
    aten.mse_loss.default: _count_elements,
    aten.nll_loss_nd.default: _count_labels,
    aten.smooth_l1_loss.default: _count_elements,
}


@dataclass(frozen=True)
class SplitMeans(Pass):
    requires = frozenset({"functional"})
    ensures = frozenset({"functional"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        for node in list(graph.nodes):
            if node.target not in _COUNTS:
                continue
            call = op_call(node)
            if call.argument("reduction") != MEAN:
                continue
            count = _COUNTS[node.target](node, call)
            divide = aten.div.Tensor if isinstance(count, fx.Node) else aten.div.Scalar
            succeed(node, _narrowed(node, emit_like(node, divide, _total(node), count)))


def _total(node: fx.Node) -> fx.Node:
    """The summed loss; in float32 if the loss has 16 bits, which would not hold the sum."""
    if dataflow.value(node).dtype.itemsize > 2:
        args, kwargs = _with_reduction(node, SUM)
        return emit_like(node, node.target, *args, **kwargs)
    args, kwargs = _with_reduction(node, NONE)
    return emit_like(node, aten.sum.default, emit_like(node, node.target, *args, **kwargs), dtype=torch.float32)


def _narrowed(node: fx.Node, loss: fx.Node) -> fx.Node:
    dtype = dataflow.value(node).dtype
    return loss if dataflow.value(loss).dtype == dtype else emit_like(node, aten.to.dtype, loss, dtype)


def _with_reduction(node: fx.Node, reduction: int) -> tuple[list[object], dict[str, object]]:
    position = [argument.name for argument in node.target._schema.arguments].index("reduction")
    args, kwargs = list(node.args), dict(node.kwargs)
    if position < len(args):
        args[position] = reduction
    else:
        kwargs["reduction"] = reduction
    return args, kwargs
