"""Take masks of queries x keys, which capture makes of flex_attention, apart into bounds and programs.

Before, with a mask computed from indices, for queries that see earlier keys of their own document::

    %ge : b8[1,1,8,8] = aten.ge.Tensor(%q_idx, %kv_idx)
    %eq : b8[2,1,8,8] = aten.eq.Tensor(%document_of_query, %document_of_key)
    %and : b8[2,1,8,8] = aten.__and__.Tensor(%ge, %eq)
    %attended = sptransform.ring_attention(%q, %k, %v, [%and], [], mask='%0')

after::

    %attended = sptransform.ring_attention(%q, %k, %v, [%document_of_query], [%document_of_key],
                                           mask='%2 = eq.Tensor(%0, %1)', nearest=0)

1. Under every strategy: flex_attention is called to have no tensor of queries x keys.
2. What is read, and how, is as in AttendByPosition.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph.edit import succeed
from sptransform.masks.bands import Band
from sptransform.masks.mask_read import emit_attention
from sptransform.masks.reader import MaskReader
from sptransform.op_rules.attention import RING_ATTENTION


@dataclass(frozen=True)
class ReadScoreMasks(Pass):
    requires = frozenset({"functional"})
    ensures = frozenset({"functional"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        nodes = [node for node in graph.nodes if node.target is RING_ATTENTION and _has_one_mask(node)]
        reader = MaskReader.of(nodes, context.rules)
        for node in nodes:
            read = reader.read(node, node.args[3][0])
            if read.blocking is not None:
                continue
            band = Band(node.kwargs.get("nearest"), node.kwargs.get("farthest")) & read.band
            sinks = node.args[5] if len(node.args) > 5 else None
            succeed(node, emit_attention(node, node.args[:3], read, band, sinks, **node.kwargs))
        graph.eliminate_dead_code()


def _has_one_mask(node: fx.Node) -> bool:
    """Whether the mask is one tensor that has queries."""
    return node.kwargs.get("mask") == "%0" and len(node.args[3]) == 1
