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
   softcap or sinks is no kernel's there: it becomes this always.
2. ``is_causal`` becomes a bound on the distance from query to key. So do mask conditions on that distance alone.
3. The rest is a program over the tensors that have the query or the key dimension (see ``masks/region.py`` for what is
   read, ``masks/visibility.py`` for what becomes bounds). A mask that cannot be read stays an operand; where queries
   and keys are not cut it stays the mask that it is.
4. A mask that requires a gradient is refused, or left where queries and keys are not cut: that gradient would have
   queries x keys entries.
5. Attention is left alone if its layout has no rule, or if it has one query.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from math import prod

import torch
from torch import fx

from sptransform.diagnostics.errors import UsageError, describe
from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow, notes
from sptransform.graph.calls import op_call, rule_at
from sptransform.graph.edit import emit_like, rename, succeed
from sptransform.masks.bands import Band, bands_between
from sptransform.masks.closed_forms import ClosedForms
from sptransform.masks.constants import Constants
from sptransform.masks.emit import broadcast_view
from sptransform.masks.expressions import KEYS, Apply, Leaf, Places, program_of
from sptransform.masks.region import Regions
from sptransform.masks.visibility import Visibility
from sptransform.op_rules.attention import ATTENTION, mask_of, sinks_of, softcap_of
from sptransform.op_rules.mask_ops import CONVERT

_LENGTH = 2


@dataclass(frozen=True)
class AttendByPosition(Pass):
    requires = frozenset({"functional"})
    ensures = frozenset({"functional"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        nodes = [node for node in graph.nodes if node.target in ATTENTION and _has_rule(node, context)]
        # constants up to the size of one layer's queries are cheap to compute once
        largest = max((_num_entries(node.args[0]) for node in nodes), default=0)
        forms = ClosedForms(context.rules)
        reader = _Reader(Regions(context.rules), Constants(largest, forms), forms)
        for node in nodes:
            mask = mask_of(node)
            is_learned = mask is not None and notes.note(mask).differentiable
            if context.strategy.reads_masks or (_is_extended(node) and not is_learned):
                read = _Read() if mask is None else reader.read(node, mask)
                _by_position(node, read, _band(node, read))
            elif mask is not None and not is_learned:
                read = reader.read(node, mask)
                band = _band(node, read)
                if not read.program and band in (Band(), Band(nearest=0)):
                    _without_mask(node, is_causal=band.nearest is not None)
                elif not read.is_square:
                    _by_position(node, read, band)
        graph.eliminate_dead_code()


def _is_extended(node: fx.Node) -> bool:
    """Whether the node is attention that fused kernels of torch have not."""
    return softcap_of(node) != 0 or sinks_of(node) is not None


def _band(node: fx.Node, read: _Read) -> Band:
    return read.band & Band(nearest=0) if op_call(node).argument("is_causal") else read.band


def _by_position(node: fx.Node, read: _Read, band: Band) -> None:
    call, sinks = op_call(node), sinks_of(node)
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
        sinks=sinks,
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


def _num_entries(node: fx.Node) -> int:
    return prod(size for size in dataflow.shape(node) if isinstance(size, int))


@dataclass(frozen=True)
class _Read:
    """A mask as arguments of the op.

    ``is_added``: the program gives numbers, not booleans; ``is_square``: an operand has the dimensions of the scores.
    """

    program: str = ""
    rows: list[fx.Node] = field(default_factory=list)
    columns: list[fx.Node] = field(default_factory=list)
    band: Band = field(default_factory=Band)
    is_added: bool = False
    is_square: bool = False


@dataclass
class _Reader:
    """Reads each mask once, even if all layers use it."""

    regions: Regions
    constants: Constants
    forms: ClosedForms
    done: dict[object, _Read] = field(default_factory=dict)
    views: dict[tuple[fx.Node, Places], fx.Node] = field(default_factory=dict)

    def read(self, attention: fx.Node, mask: fx.Node) -> _Read:
        if notes.note(mask).differentiable:
            raise UsageError(
                describe(
                    "attention masks computed block by block have no gradient",
                    node=attention,
                    found=f"%{mask.name}, a mask that depends on trainable tensors or inputs",
                    fix="strategy='ulysses', or a mask without gradients: mask.detach()",
                )
            )
        query, key = (dataflow.shape(x) for x in attention.args[:2])
        cast = _cast_of(attention, mask)
        identity = (mask, query[_LENGTH], key[_LENGTH], cast)
        if identity not in self.done:
            expression = self.regions.expression(mask)
            if cast is not None:
                expression = Apply(CONVERT, (expression, cast), {}, cast)
            sizes = query[_LENGTH], key[_LENGTH]
            bands = bands_between(*sizes, self.constants, self.forms)
            visible = Visibility(self.constants, bands, sizes[0] == sizes[1]).of(expression)
            if visible.rest is None:
                self.done[identity] = _Read(band=visible.band)
            else:
                program, rows, columns = program_of(visible.rest)
                operands = [[self._view(leaf) for leaf in leaves] for leaves in (rows, columns)]
                is_added = visible.rest.dtype != torch.bool
                is_square = any(leaf.has(KEYS) for leaf in rows)
                self.done[identity] = _Read(str(program), *operands, visible.band, is_added, is_square)
        return self.done[identity]

    def _view(self, leaf: Leaf) -> fx.Node:
        """The leaf's tensor, viewed to broadcast to scores. The view stands where the leaf is first read."""
        key = (leaf.node, leaf.places)
        if key not in self.views:
            view = leaf.node if leaf.broadcasts else broadcast_view(leaf.node, leaf.places, leaf.reader)
            if notes.note(view).differentiable:  # the mask itself is not: it compares, or was detached later
                view = emit_like(leaf.reader, torch.ops.aten.detach.default, view)
                notes.note(view).differentiable = False
            self.views[key] = view
        return self.views[key]


def _cast_of(attention: fx.Node, mask: fx.Node) -> torch.dtype | None:
    """The dtype to which autocast casts a mask that is added to scores; None if it does not cast."""
    value = dataflow.value(mask)
    if attention.kwargs.get("explicit", False):
        return None  # it adds the mask itself
    if not value.dtype.is_floating_point or value.dtype == torch.float64:
        return None
    with notes.region_of(attention).autocast():
        if not torch.is_autocast_enabled(value.device.type):
            return None
        dtype = torch.get_autocast_dtype(value.device.type)
    return dtype if dtype != value.dtype else None
