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
   Attention with a softcap or sinks always, unless its mask has a gradient: fused attention of torch has neither.
2. ``is_causal`` becomes a bound on the distance from query to key. So do mask conditions on that distance alone.
3. The rest is a program over the tensors that have the query or the key dimension (see ``masks/region.py`` for what is
   read, ``masks/visibility.py`` for what becomes bounds). A mask that cannot be read stays an operand.
4. A mask that requires a gradient is refused: that gradient would have queries x keys entries.
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
from sptransform.masks.constants import Constants
from sptransform.masks.emit import broadcast_view
from sptransform.masks.expressions import Apply, Leaf, Places, program_of
from sptransform.masks.region import Regions
from sptransform.masks.visibility import Band, Visibility
from sptransform.op_rules.attention import ATTENTION, mask_of, sinks_of, softcap_of
from sptransform.op_rules.mask_ops import CONVERT
from sptransform.sharding.sizes import SymbolicSizeError

_LENGTH = 2


@dataclass(frozen=True)
class AttendByPosition(Pass):
    requires = frozenset({"functional"})
    ensures = frozenset({"functional"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        nodes = [node for node in graph.nodes if node.target in ATTENTION and _is_asked_for(node, context)]
        nodes = [node for node in nodes if _has_rule(node, context)]
        # constants up to the size of one layer's queries are cheap to compute once
        largest = max((_num_entries(node.args[0]) for node in nodes), default=0)
        reader = _Reader(Regions(context.rules), Constants(largest))
        for node in nodes:
            call = op_call(node)
            mask = mask_of(node)
            read = _Read() if mask is None else reader.read(node, mask)
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
                sinks=sinks_of(node),
                softcap=softcap_of(node),
            )
            rename(new, "ring_attention")
            succeed(node, emit_like(node, operator.getitem, new, 0))
        graph.eliminate_dead_code()


def _is_asked_for(node: fx.Node, context: Context) -> bool:
    if context.strategy.reads_masks:
        return True
    mask = mask_of(node)
    is_learned = mask is not None and notes.note(mask).differentiable
    return not is_learned and (softcap_of(node) != 0 or sinks_of(node) is not None)


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
    """A mask as arguments of the op."""

    program: str = ""
    rows: list[fx.Node] = field(default_factory=list)
    columns: list[fx.Node] = field(default_factory=list)
    band: Band = field(default_factory=Band)


@dataclass
class _Reader:
    """Reads each mask once, even if all layers use it."""

    regions: Regions
    constants: Constants
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
        if not all(isinstance(size, int) for size in (query[_LENGTH], key[_LENGTH], *dataflow.shape(mask))):
            raise SymbolicSizeError(f"the positions that %{mask.name} compares are those of one length")
        cast = _cast_of(attention, mask)
        identity = (mask, query[_LENGTH], key[_LENGTH], cast)
        if identity not in self.done:
            expression = self.regions.expression(mask)
            if cast is not None:
                expression = Apply(CONVERT, (expression, cast), {}, cast)
            visible = Visibility(query[_LENGTH], key[_LENGTH], self.constants).of(expression)
            if visible.rest is None:
                self.done[identity] = _Read(band=visible.band)
            else:
                program, rows, columns = program_of(visible.rest)
                operands = [[self._view(leaf) for leaf in leaves] for leaves in (rows, columns)]
                self.done[identity] = _Read(str(program), *operands, visible.band)
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
    if not value.dtype.is_floating_point or value.dtype == torch.float64:
        return None
    with notes.region_of(attention).autocast():
        if not torch.is_autocast_enabled(value.device.type):
            return None
        dtype = torch.get_autocast_dtype(value.device.type)
    return dtype if dtype != value.dtype else None
