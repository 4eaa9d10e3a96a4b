"""Send queries, keys and values in the dtype that attention computes in.

Under autocast, attention takes float32 queries and keys (rotary embeddings make them so) and computes in bfloat16. The
cast is inside the op, after the all-to-all. Before::

    %out : bf16[..] = aten.scaled_dot_product_attention(%q : f32, %k : f32, %v : bf16)

after, the same numbers, half the bytes, and one all-to-all for all three::

    %q1 : bf16[..] = aten.to.dtype(%q, bfloat16)
    %k1 : bf16[..] = aten.to.dtype(%k, bfloat16)
    %out : bf16[..] = aten.scaled_dot_product_attention(%q1, %k1, %v)

1. Only queries, keys and values whose dtype is not that of the output are cast.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow
from sptransform.graph.edit import emit_like, replace_operand
from sptransform.op_rules.attention import ATTENTION


@dataclass(frozen=True)
class CastAttentionInputs(Pass):
    requires = frozenset({"functional"})
    ensures = frozenset({"functional"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        for node in list(graph.nodes):
            if node.target in ATTENTION:
                dtype = dataflow.value(node).dtype
                for index, operand in enumerate(dataflow.operands(node)[:3]):
                    if dataflow.value(operand).dtype != dtype:
                        replace_operand(node, index, emit_like(node, torch.ops.aten.to.dtype, operand, dtype))
