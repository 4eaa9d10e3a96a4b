"""Emits nodes for masks: constants, triangles as comparisons of positions, views with the dimensions of the scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sptransform.graph import dataflow
from sptransform.graph.calls import op_call
from sptransform.graph.edit import emit_like
from sptransform.masks.expressions import ENTRIES, HEADS, Places
from sptransform.op_rules.rearrangement import RESHAPES
from sptransform.rules.rule import map_nodes

aten = torch.ops.aten


def filled(node: fx.Node, value: Any) -> fx.Node:
    """A scalar, emitted before ``node``, that broadcasts to it."""
    like = dataflow.value(node)
    return emit_like(node, aten.full.default, [], value, dtype=like.dtype, device=like.device)


def _triangle(node: fx.Node, above: bool) -> fx.Node:
    """``tril`` or ``triu`` of any tensor, by positions: zero where ``j - i`` is beyond the diagonal ``d``."""
    call = op_call(node)
    shape, device = call.result_shapes[0], dataflow.value(node).device
    queries = emit_like(node, aten.arange.default, shape[-2], device=device)
    keys = emit_like(node, aten.arange.default, shape[-1], device=device)
    distance = emit_like(node, aten.sub.Tensor, keys, emit_like(node, aten.unsqueeze.default, queries, 1))
    compare = aten.lt.Scalar if above else aten.gt.Scalar
    beyond = emit_like(node, compare, distance, call.argument("diagonal"))
    return emit_like(node, aten.masked_fill.Scalar, node.args[0], beyond, 0)


# Decompositions into pointwise ops over positions
OPENED: dict[Any, Callable[[fx.Node], fx.Node]] = {
    aten.tril.default: lambda node: _triangle(node, above=False),
    aten.triu.default: lambda node: _triangle(node, above=True),
}


def broadcast_view(node: fx.Node, places: Places, before: fx.Node) -> fx.Node:
    """View ``node`` with each dimension at its place, size 1 between; size-1 dimensions without a place are dropped."""
    dropped = [dim for dim, place in enumerate(places) if place is None]
    kept = [place for place in places if place is not None]
    if dropped:
        node = emit_like(before, aten.squeeze.dims, node, dropped)
    if kept != sorted(kept):
        node = emit_like(before, aten.permute.default, node, sorted(range(len(kept)), key=kept.__getitem__))
    first = min(kept, default=0)
    for place in range(first, 0):
        if place not in kept:
            node = emit_like(before, aten.unsqueeze.default, node, place - first)
    return node


def table_view(node: fx.Node, places: Places, before: fx.Node) -> fx.Node:
    """View a table as [heads or 1, entries]."""
    place_of = {HEADS: -2, ENTRIES: -1, None: None}
    view = broadcast_view(node, tuple(place_of[place] for place in places), before)
    return view if len(dataflow.shape(view)) == 2 else emit_like(before, aten.unsqueeze.default, view, 0)


def unflattened(node: fx.Node, dim: int | None) -> fx.Node | None:
    """A reshape of a lookup by a flat index as the lookup by an index of more dimensions; None if it is no such thing.

    ``dim`` is the dimension of the table in which is looked up.
    """
    (lookup,) = dataflow.operands(node)
    table, index = dataflow.operands(lookup)
    if dim is None or len(dataflow.shape(index)) != 1:
        return None
    before, after = dataflow.shape(table)[:dim], dataflow.shape(table)[dim + 1 :]
    shape = dataflow.shape(node)
    spread = shape[dim : len(shape) - len(after)]
    if shape != (*before, *spread, *after):
        return None
    # most often it was flattened for the lookup, by a reshape too
    whole = dataflow.operands(index)[0] if index.target in RESHAPES else index
    if dataflow.shape(whole) != spread:
        whole = emit_like(node, aten.reshape.default, index, list(spread))
    args, kwargs = map_nodes((lookup.args, dict(lookup.kwargs)), lambda x: whole if x is index else x)
    return emit_like(node, lookup.target, *args, **kwargs)
