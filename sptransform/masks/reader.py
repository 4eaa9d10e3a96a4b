"""Reads a mask of attention as bounds on distances and a program, the arguments of ring attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import fx

from sptransform.graph import dataflow, notes
from sptransform.graph.edit import emit_like
from sptransform.masks.closed_forms import ClosedForms
from sptransform.masks.constants import Constants
from sptransform.masks.emit import broadcast_view, table_view
from sptransform.masks.expressions import Apply, Leaf, Places
from sptransform.masks.mask_read import MaskRead
from sptransform.masks.region import Regions
from sptransform.masks.visibility import Visibility
from sptransform.op_rules.mask_ops import CONVERT, NOT
from sptransform.rules.table import RuleTable

_LENGTH = 2


@dataclass
class MaskReader:
    """Reads each mask once, even if all layers use it."""

    regions: Regions
    constants: Constants
    done: dict[object, MaskRead] = field(default_factory=dict)
    views: dict[tuple[fx.Node, Places, bool], fx.Node] = field(default_factory=dict)

    @classmethod
    def of(cls, attention: Sequence[fx.Node], rules: RuleTable) -> MaskReader:
        """A reader of the masks of these nodes."""
        # constants up to the size of one layer's queries are cheap to compute once
        largest = max((num_entries(node.args[0]) for node in attention), default=0)
        return cls(Regions(rules), Constants(largest, ClosedForms(rules)))

    def read(self, attention: fx.Node, mask: fx.Node, cast: torch.dtype | None = None) -> MaskRead:
        """The mask of ``attention``, whose op casts it to ``cast``."""
        query, key = (dataflow.shape(x) for x in attention.args[:2])
        identity = (mask, query[_LENGTH], key[_LENGTH], cast)
        if identity not in self.done:
            expression = self.regions.expression(mask)
            if cast is not None:
                expression = Apply(CONVERT, (expression, cast), {}, cast)
            visible = Visibility(query[_LENGTH], key[_LENGTH], self.constants).of(expression)
            self.done[identity] = MaskRead.of(visible, self._view)
        return self.done[identity]

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


def leaves_own_keys(hidden: fx.Node, largest: int, rules: RuleTable) -> bool:
    """Whether it is known of no query that the key at its own position is hidden.

    Args:
        hidden: boolean, broadcasts to the scores.
        largest: tensors with more entries are not computed to know it.
    """
    num_queries, num_keys = dataflow.shape(hidden)[-2:]
    if num_queries != num_keys:
        return False
    seen = Apply(NOT, (Regions(rules).expression(hidden),), {}, torch.bool)
    visible = Visibility(num_queries, num_keys, Constants(largest, ClosedForms(rules))).of(seen)
    return visible.rest is None and visible.band.holds(0)


def cast_of(attention: fx.Node, mask: fx.Node) -> torch.dtype | None:
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


def num_entries(node: fx.Node) -> int:
    """Entries of the node's tensor, an open size counted as 1."""
    return prod(size for size in dataflow.shape(node) if isinstance(size, int))
