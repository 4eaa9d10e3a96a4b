"""Compute attention masks from positions, so that no tensor of queries x keys is needed.

Before, causal attention over documents packed into one sequence, where only ``%document`` is an input::

    %le : b8[1,1,8,8] = aten.le.Tensor(%keys, %queries)
    %eq : b8[2,1,8,8] = aten.eq.Tensor(%document_of_queries, %document_of_keys)
    %and : b8[2,1,8,8] = aten.__and__.Tensor(%le, %eq)
    %out = aten.scaled_dot_product_attention(%q, %k, %v, %and)

after, no tensor has both dimensions; the mask of each block of scores is computed when it is needed::

    %ring_attention = sptransform.ring_attention(%q, %k, %v, [%document_of_queries], [%document_of_keys],
                                                 mask='%2 = eq.Tensor(%0, %1)', nearest=0)
    %out = getitem(%ring_attention, 0)

1. Only if the strategy asks for it (``reads_masks``): queries are cut, and each rank sees all keys of its own queries.
2. ``is_causal`` becomes a bound on the distance from query to key. So do mask conditions on that distance alone.
3. The rest is a program over the tensors that have the query or the key dimension (see ``masks/region.py`` for what is
   read, ``masks/visibility.py`` for what becomes bounds). A mask that cannot be read stays an operand.
4. A mask that requires a gradient is refused: that gradient would have queries x keys entries.
5. Attention is left alone if its layout has no rule, or if it has one query.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow
from sptransform.graph.calls import op_call, rule_at
from sptransform.graph.edit import emit_like, rename, succeed
from sptransform.masks.constants import Constants
from sptransform.masks.reader import MaskRead, MaskReader, cast_of
from sptransform.masks.region import Regions
from sptransform.masks.visibility import Band
from sptransform.op_rules.attention import ATTENTION, mask_of

_LENGTH = 2


@dataclass(frozen=True)
class AttendByPosition(Pass):
    requires = frozenset({"functional"})
    ensures = frozenset({"functional"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        if not context.strategy.reads_masks:
            return
        nodes = [node for node in graph.nodes if node.target in ATTENTION and _has_rule(node, context)]
        # constants up to the size of one layer's queries are cheap to compute once
        largest = max((_num_entries(node.args[0]) for node in nodes), default=0)
        reader = MaskReader(Regions(context.rules), Constants(largest))
        for node in nodes:
            call = op_call(node)
            mask = mask_of(node)
            read = MaskRead() if mask is None else reader.read(node, mask, cast_of(node, mask))
            band = read.band & Band(nearest=0) if call.argument("is_causal") else read.band
            new = emit_like(
                node,
                torch.ops.sptransform.ring_attention.default,
                *node.args[:3],
                read.rows,
                read.columns,
                mask=read.program,
                nearest=band.nearest,
                farthest=band.farthest,
                dropout_p=call.argument("dropout_p"),
                scale=call.argument("scale"),
            )
            rename(new, "ring_attention")
            succeed(node, emit_like(node, operator.getitem, new, 0))
        graph.eliminate_dead_code()


def _has_rule(node: fx.Node, context: Context) -> bool:
    """Whether the ring supports this layout; the rule checks the heads."""
    rule = rule_at(node, context.rules)
    query, key, value = (dataflow.shape(x) for x in node.args[:3])
    same_batch = query[0] == key[0] == value[0] and key[_LENGTH] == value[_LENGTH]
    return rule is not None and rule.has_sequence and same_batch


def _num_entries(node: fx.Node) -> int:
    return prod(size for size in dataflow.shape(node) if isinstance(size, int))
