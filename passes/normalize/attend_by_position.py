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

1. A strategy that cuts queries or keys (``reads_masks``) needs this of every attention. Others keep attention without a
   mask, and masks that are read as nothing but ``is_causal`` become that, for kernels that know it. Attention with a
   softcap, sinks or dropout is no kernel's there: it becomes this where its mask can be read, and is computed in tiles.
2. ``is_causal`` becomes a bound on the distance from query to key. So do mask conditions on that distance alone.
3. The rest is a program over the tensors that have the query or the key dimension, and tables in which it looks up (see
   ``masks/region.py`` for what is read, ``masks/visibility.py`` for what becomes bounds). A mask that cannot be read
   stays an operand; where queries and keys are not cut it stays the mask that it is.
4. A program's operands have gradients (``ops/mask_gradients.py``), a learned table of a bias by distance for one. An op
   on their way that passes none is refused; where queries and keys are not cut, the mask is left.
5. A negative scale is one of queries: kernels hide keys before they scale, and would show those alone.
6. Attention is left alone if its layout has no rule, or if it has one query.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from sptransform.diagnostics.errors import UsageError, describe
from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow
from sptransform.graph.calls import op_call, rule_at
from sptransform.graph.edit import emit_like, rename, succeed
from sptransform.masks.bands import Band
from sptransform.masks.mask_read import MaskRead, emit_attention
from sptransform.masks.reader import MaskReader, cast_of
from sptransform.op_rules.attention import ATTENTION, mask_of, sinks_of, softcap_of

aten = torch.ops.aten

_LENGTH = 2


@dataclass(frozen=True)
class AttendByPosition(Pass):
    requires = frozenset({"functional"})
    ensures = frozenset({"functional"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        nodes = [node for node in graph.nodes if node.target in ATTENTION and _has_rule(node, context)]
        reader = MaskReader.of(nodes, context.rules)
        for node in nodes:
            mask = mask_of(node)
            _scale_positively(node)
            if context.strategy.reads_masks or _is_extended(node):
                read = MaskRead() if mask is None else reader.read(node, mask, cast_of(node, mask))
                if read.blocking is None or context.strategy.reads_masks:
                    _check_gradient(node, mask, read)
                    _by_position(node, read, _band(node, read))
            elif mask is not None:
                read = reader.read(node, mask, cast_of(node, mask))
                band = _band(node, read)
                if not read.program and band in (Band(), Band(nearest=0)):
                    _without_mask(node, is_causal=band.nearest is not None)
                elif not read.is_square and read.blocking is None:
                    _by_position(node, read, band)
        graph.eliminate_dead_code()


def _scale_positively(node: fx.Node) -> None:
    scale = op_call(node).argument("scale")
    if scale is not None and scale < 0:
        node.update_arg(0, emit_like(node, aten.neg.default, node.args[0]))
        node.update_kwarg("scale", -scale)


def _is_extended(node: fx.Node) -> bool:
    """Whether torch's fused kernels cannot compute the attention, or would drop alike on all ranks."""
    return softcap_of(node) != 0 or sinks_of(node) is not None or op_call(node).argument("dropout_p") > 0


def _band(node: fx.Node, read: MaskRead) -> Band:
    return read.band & Band(nearest=0) if op_call(node).argument("is_causal") else read.band


def _check_gradient(node: fx.Node, mask: fx.Node | None, read: MaskRead) -> None:
    if read.blocking is not None:
        raise UsageError(
            describe(
                f"an attention mask computed block by block has no gradient through {read.blocking}",
                node=node,
                found=f"%{mask.name}, a mask that depends on trainable tensors or inputs",
                fix="strategy='ulysses', a mask without gradients: mask.detach(), or another op in its place",
            )
        )


def _by_position(node: fx.Node, read: MaskRead, band: Band) -> None:
    call, sinks = op_call(node), sinks_of(node)
    new = emit_attention(
        node,
        node.args[:3],
        read,
        band,
        sinks,
        dropout_p=call.argument("dropout_p"),
        scale=call.argument("scale"),
        softcap=softcap_of(node),
        # beside a sink keys that are masked by a large number vanish
        explicit=read.is_added and sinks is None and node.kwargs.get("explicit", False),
    )
    rename(new, "ring_attention")
    succeed(node, emit_like(node, operator.getitem, new, 0))


def _without_mask(node: fx.Node, is_causal: bool) -> None:
    dropout_p = op_call(node).argument("dropout_p")
    named = {key: x for key, x in node.kwargs.items() if key not in ("attn_mask", "dropout_p", "is_causal", "explicit")}
    succeed(node, emit_like(node, node.target, *node.args[:3], None, dropout_p, is_causal, **named))


def _has_rule(node: fx.Node, context: Context) -> bool:
    """Whether the ring supports this layout; the rule checks the heads."""
    rule = rule_at(node, context.rules)
    query, key, value = (dataflow.shape(x) for x in node.args[:3])
    same_batch = query[0] == key[0] == value[0] and key[_LENGTH] == value[_LENGTH]
    return rule is not None and rule.has_sequence and same_batch
