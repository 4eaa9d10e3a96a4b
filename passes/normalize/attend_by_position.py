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
   mask, and masks that are read as nothing but ``is_causal`` become that, for kernels that know it.
2. ``is_causal`` becomes a bound on the distance from query to key. So do mask conditions on that distance alone.
3. The rest is a program over the tensors that have the query or the key dimension, and tables in which it looks up (see
   ``masks/region.py`` for what is read, ``masks/visibility.py`` for what becomes bounds). A mask that cannot be read
   stays an operand; where queries and keys are not cut it stays the mask that it is.
4. A program's operands have gradients (``ops/mask_gradients.py``), a learned table of a bias by distance for one. An op
   on their way that passes none is refused; where queries and keys are not cut, the mask is left.
5. Attention is left alone if its layout has no rule, or if it has one query.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import fx

from sptransform.diagnostics.errors import UsageError, describe
from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow, notes
from sptransform.graph.calls import op_call, rule_at
from sptransform.graph.edit import emit_like, rename, succeed
from sptransform.masks.bands import Band, Bands, DerivedBands, MeasuredBands
from sptransform.masks.closed_forms import ClosedForms
from sptransform.masks.constants import Constants
from sptransform.masks.emit import broadcast_view, table_view
from sptransform.masks.expressions import KEYS, Apply, Leaf, Places, program_of
from sptransform.masks.region import Regions
from sptransform.masks.visibility import Visibility
from sptransform.op_rules.attention import ATTENTION, mask_of
from sptransform.op_rules.mask_ops import CONVERT
from sptransform.ops.mask_gradients import without_gradient
from sptransform.sharding.sizes import Size

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
            if context.strategy.reads_masks:
                read = _Read() if mask is None else reader.read(node, mask)
                _check_gradient(node, mask, read)
                _by_position(node, read, _band(node, read))
            elif mask is not None:
                read = reader.read(node, mask)
                band = _band(node, read)
                if not read.program and band in (Band(), Band(nearest=0)):
                    _without_mask(node, is_causal=band.nearest is not None)
                elif not read.is_square and read.blocking is None:
                    _by_position(node, read, band)
        graph.eliminate_dead_code()


def _band(node: fx.Node, read: _Read) -> Band:
    return read.band & Band(nearest=0) if op_call(node).argument("is_causal") else read.band


def _check_gradient(node: fx.Node, mask: fx.Node | None, read: _Read) -> None:
    if read.blocking is not None:
        raise UsageError(
            describe(
                f"an attention mask computed block by block has no gradient through {read.blocking}",
                node=node,
                found=f"%{mask.name}, a mask that depends on trainable tensors or inputs",
                fix="strategy='ulysses', a mask without gradients: mask.detach(), or another op in its place",
            )
        )


def _by_position(node: fx.Node, read: _Read, band: Band) -> None:
    call = op_call(node)
    tables = [None, read.tables] if read.tables else []  # after the sinks
    new = emit_like(
        node,
        torch.ops.sptransform.ring_attention.default,
        *node.args[:3],
        read.rows,
        read.columns,
        *tables,
        mask=read.program,
        nearest=band.nearest,
        farthest=band.farthest,
        dropout_p=call.argument("dropout_p"),
        scale=call.argument("scale"),
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

    ``is_square``: an operand has the dimensions of the scores. ``blocking``: the op through which the gradient of an
    operand does not pass.
    """

    program: str = ""
    rows: list[fx.Node] = field(default_factory=list)
    columns: list[fx.Node] = field(default_factory=list)
    tables: list[fx.Node] = field(default_factory=list)
    band: Band = field(default_factory=Band)
    is_square: bool = False
    blocking: Any = None


@dataclass
class _Reader:
    """Reads each mask once, even if all layers use it."""

    regions: Regions
    constants: Constants
    forms: ClosedForms
    done: dict[object, _Read] = field(default_factory=dict)
    views: dict[tuple[fx.Node, Places, bool], fx.Node] = field(default_factory=dict)

    def read(self, attention: fx.Node, mask: fx.Node) -> _Read:
        query, key = (dataflow.shape(x) for x in attention.args[:2])
        cast = _cast_of(attention, mask)
        identity = (mask, query[_LENGTH], key[_LENGTH], cast)
        if identity not in self.done:
            expression = self.regions.expression(mask)
            if cast is not None:
                expression = Apply(CONVERT, (expression, cast), {}, cast)
            visible = Visibility(self.constants, self._bands(query[_LENGTH], key[_LENGTH])).of(expression)
            if visible.rest is None:
                self.done[identity] = _Read(band=visible.band)
            else:
                program = program_of(visible.rest)
                operands = [[*map(self._view, leaves)] for leaves in (program.rows, program.columns, program.tables)]
                is_square = any(leaf.has(KEYS) for leaf in program.rows)
                blocking = without_gradient(program.text, program.trained)
                self.done[identity] = _Read(str(program.text), *operands, visible.band, is_square, blocking)
        return self.done[identity]

    def _bands(self, num_queries: Size, num_keys: Size) -> Bands:
        if isinstance(num_queries, int) and isinstance(num_keys, int):
            return MeasuredBands(num_queries, num_keys, self.constants)
        return DerivedBands(self.forms)

    def _view(self, leaf: Leaf) -> fx.Node:
        """The leaf's tensor, viewed to broadcast to scores, or as a table, where it is first read."""
        key = (leaf.node, leaf.places, leaf.detached)
        if key not in self.views:
            view = leaf.node
            if leaf.is_table:
                view = table_view(view, leaf.places, leaf.reader)
            elif not leaf.broadcasts:
                view = broadcast_view(view, leaf.places, leaf.reader)
            if leaf.detached:
                view = emit_like(leaf.reader, torch.ops.aten.detach.default, view)
                notes.note(view).differentiable = False
            self.views[key] = view
        return self.views[key]


def _cast_of(attention: fx.Node, mask: fx.Node) -> torch.dtype | None:
    """The dtype to which autocast casts a mask that is added to scores; None if it does not cast."""
    value = dataflow.value(mask)
    if not value.dtype.is_floating_point or value.dtype == torch.float64:
        return None
    with notes.region_of(attention).autocast():
        if not torch.is_autocast_enabled(value.device.type):
            return None
        dtype = torch.get_autocast_dtype(value.device.type)
    return dtype if dtype != value.dtype else None
