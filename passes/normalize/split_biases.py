"""Take the bias out of a matmul whose weight may be cut.

Before: ``%y = aten.linear(%x, %weight, %bias)``; after::

    %product = aten.linear(%x, %weight)
    %y = aten.add(%product, %bias)

A row-parallel product is a pending sum: a bias added on every rank would count N times. As in Megatron-LM, it is added
after the reduce-scatter, on each rank's shard of the sequence.

1. Applies to ``linear``, ``addmm`` and ``baddbmm``, the latter two only with ``alpha`` and ``beta`` of 1.
2. Under autocast the bias is cast to the dtype of the product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow
from sptransform.graph.calls import op_call
from sptransform.graph.edit import emit_like, succeed

aten = torch.ops.aten


# op -> (its product, names of the product's operands, name of the bias)
_PRODUCTS = {
    aten.addmm.default: (aten.mm.default, ("mat1", "mat2"), "self"),
    aten.baddbmm.default: (aten.bmm.default, ("batch1", "batch2"), "self"),
    aten.linear.default: (aten.linear.default, ("input", "weight"), "bias"),
}


@dataclass(frozen=True)
class SplitBiases(Pass):
    requires = frozenset({"functional"})
    ensures = frozenset({"functional"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        if not context.strategy.shards_weights:
            return
        for node in list(graph.nodes):
            if node.target in _PRODUCTS:
                _split(node)


def _split(node: fx.Node) -> None:
    call = op_call(node)
    product, names, bias = _PRODUCTS[node.target]
    operands = dataflow.operands(node)
    at = call.operand(bias)
    if at is None or any(call.argument(factor) != 1 for factor in ("alpha", "beta") if product is not node.target):
        return
    product = emit_like(node, product, *(operands[call.operand(name)] for name in names))
    added = operands[at]
    if dataflow.value(added).dtype != dataflow.value(product).dtype:
        added = emit_like(node, aten.to.dtype, added, dataflow.value(product).dtype)
    succeed(node, emit_like(node, aten.add.Tensor, product, added))
