"""What a call of an attention kernel hides, as bounds on distances and an expression for the rest.

====================================  ==========================================================================
a window, or causal                   bounds: of one sequence, and of documents that are the same for both sides
documents                             the query's document is the key's
a window inside of other documents    comparisons of positions, the queries' shifted so that documents end alike
ALiBi                                 ``-slope * |distance|``, added
====================================  ==========================================================================
"""

from __future__ import annotations

import torch
from torch import fx

from sptransform.graph import dataflow, notes
from sptransform.graph.edit import emit_like
from sptransform.masks.bands import Band
from sptransform.masks.documents import Documents, source_of
from sptransform.masks.expressions import Apply, Expression, Leaf, from_the_right
from sptransform.masks.visibility import Visible, joined
from sptransform.op_rules.attention_kernels import KernelCall
from sptransform.sharding.sizes import Size, number

aten = torch.ops.aten


def visible_in(call: KernelCall, num_queries: Size, num_keys: Size, node: fx.Node, documents: Documents) -> Visible:
    """What the call at ``node`` lets queries see."""
    ends = None if call.documents is None else tuple(map(source_of, call.documents))
    conditions: list[Expression] = []
    if ends is not None:
        of_queries = _row(documents.of_queries(ends[0], num_queries, node), node)
        conditions.append(_apply(aten.eq.Tensor, of_queries, _leaf(documents.of_keys(ends[1], num_keys, node))))
    band = Band()
    shifted = ends is not None and ends[0] is not ends[1]
    has_window = call.before is not None or call.after is not None
    distance = None
    if call.slopes is not None or (shifted and has_window):
        like = node.args[0] if ends is None else ends[1]
        if shifted:
            own = documents.aligned(*ends, num_queries, node)
        else:
            own = documents.positions(num_queries, like, node, _ahead(num_queries, num_keys, ends))
        keys = documents.positions(num_keys, like, node)
        distance = _apply(aten.sub.Tensor, _row(own, node), _leaf(keys), dtype=dataflow.value(keys).dtype)
    if shifted and call.before is not None:
        conditions.append(_apply(aten.le.Scalar, distance, call.before))
    if shifted and call.after is not None:
        conditions.append(_apply(aten.ge.Scalar, distance, -call.after))
    if has_window and not shifted:
        ahead = number(_ahead(num_queries, num_keys, ends))
        nearest = None if call.after is None else -call.after - ahead
        band = Band(nearest, None if call.before is None else call.before - ahead)
    bias = None if call.slopes is None else _slanted(call.slopes, distance, node)
    return Visible(band, joined([(condition, True) for condition in conditions], bias))


def _ahead(num_queries: Size, num_keys: Size, ends: tuple[fx.Node, ...] | None) -> Size:
    """The position among keys of the first query; documents that are the same begin together."""
    return 0 if ends is not None or num_keys == num_queries else num_keys - num_queries


def _slanted(slopes: fx.Node, distance: Expression, node: fx.Node) -> Expression:
    """``-slope * |distance|``, with a slope for each head, or for each sequence and head."""
    if notes.note(slopes).differentiable:  # the kernels give them no gradient
        slopes = emit_like(node, aten.detach.default, slopes)
        notes.note(slopes).differentiable = False
    shape = [*dataflow.shape(slopes), 1, 1]
    of_head = _leaf(emit_like(node, aten.reshape.default, slopes, shape))
    far = _apply(
        aten.mul.Tensor, of_head, _apply(aten.abs.default, distance, dtype=distance.dtype), dtype=of_head.dtype
    )
    return _apply(aten.neg.default, far, dtype=of_head.dtype)


def _row(x: fx.Node, node: fx.Node) -> Leaf:
    """``x``, one entry a query, along the queries of the scores."""
    return _leaf(emit_like(node, aten.unsqueeze.default, x, 1))


def _leaf(x: fx.Node) -> Leaf:
    return Leaf(x, from_the_right(len(dataflow.shape(x))), x)


def _apply(target: object, *args: object, dtype: torch.dtype = torch.bool) -> Apply:
    return Apply(target, args, {}, dtype)
