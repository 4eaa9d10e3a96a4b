"""Read the chunked ops of torch's ``linear_cross_entropy`` as ours, whose tokens and classes can be cut.

Before, as ``functional.linear_cross_entropy(.., options=LinearCrossEntropyOptions(..))`` calls them::

    %four = torch_nn._linear_cross_entropy_batch_chunked(%x, %weight, %labels, None, None, 'sum', -100, 0.0, 512, ..)
    %loss = getitem(%four, 0)

after::

    %both = sptransform.linear_cross_entropy(%x, %weight, %labels, None, [], chunk=512)
    %losses = getitem(%both, 0)
    %loss = aten.sum(%losses)

1. A chunk has as many tokens as the user asked torch for, unless ``loss_chunk`` is a number.
2. What torch's options say of precision is the least that the user asks: sums and 16-bit gradients are in float32 here.
3. A mean is written as a sum and a global count, as ``SplitMeans`` does; losses are weighted by the labels' classes.
4. Without options, torch's function is a linear and a cross-entropy, for ``ChunkLosses``.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow
from sptransform.graph.calls import arguments_of
from sptransform.graph.edit import emit_like, succeed
from sptransform.losses.readers import class_weights

aten, sp = torch.ops.aten, torch.ops.sptransform

# by their names: torch has them since 2.13
SUMMED = "torch_nn::_linear_cross_entropy_batch_chunked"
TOKENS = "torch_nn::_linear_cross_entropy_batch_chunked_no_reduction"


@dataclass(frozen=True)
class ReadLinearCrossEntropy(Pass):
    requires = frozenset({"functional"})
    ensures = frozenset({"functional"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        for node in list(graph.nodes):
            name = node.target.name() if dataflow.is_op(node.target) else None
            if name == TOKENS:
                succeed(node, _loss(node, node, context))
            elif name == SUMMED:  # the other results are gradients, which only its own backward reads
                for user in list(node.users):
                    succeed(user, _loss(node, user, context))
        graph.eliminate_dead_code()


def _loss(node: fx.Node, result: fx.Node, context: Context) -> fx.Node:
    """What takes the place of ``result``, the loss that ``node`` computes."""
    given, _ = arguments_of(node)
    x, weight, bias, labels = (given[name] for name in ("input", "linear_weight", "linear_bias", "target"))
    ignored, reduction = given["ignore_index"], given.get("reduction", "none")
    dtype = torch.promote_types(dataflow.value(x).dtype, dataflow.value(weight).dtype)

    def cast(x: fx.Node | None, dtype: torch.dtype) -> fx.Node | None:
        is_same = x is None or dataflow.value(x).dtype == dtype
        return x if is_same else emit_like(result, aten.to.dtype, x, dtype)

    both = emit_like(
        result,
        sp.linear_cross_entropy.default,
        *(cast(x, dtype), cast(weight, dtype), labels, cast(bias, dtype), []),
        chunk=context.loss_chunk if isinstance(context.loss_chunk, int) else given["batch_chunk_size"],
        ignore_index=ignored,
        label_smoothing=given.get("label_smoothing", 0.0),
    )
    loss = emit_like(result, operator.getitem, both, 0)
    counted = emit_like(result, aten.ne.Scalar, labels, ignored)
    if given["weight"] is not None:
        of_classes = class_weights(given["weight"], labels, ignored, result)
        loss = emit_like(result, aten.mul.Tensor, loss, of_classes)
        counted = emit_like(result, aten.mul.Tensor, of_classes, counted)
    if reduction != "none":
        loss = emit_like(result, aten.sum.default, loss)
    if reduction == "mean":
        loss = emit_like(result, aten.div.Tensor, loss, emit_like(result, aten.sum.default, counted))
    return cast(loss, dataflow.value(result).dtype)
