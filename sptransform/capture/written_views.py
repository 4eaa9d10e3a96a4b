"""What a tensor holds after one of its views is written, as out-of-place ops: each view op has its inverse.

A slice, a row, a diagonal or a piece is scattered into its base; a permutation is permuted back, a reshape reshaped.
For any other view, the same view of the entries' numbers says which entries were written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import fx

from sptransform.graph import dataflow
from sptransform.graph.calls import arguments_of

aten = torch.ops.aten
Emit = Callable[..., fx.Node]

# view op -> the op that writes a new value of the view into its base; both have the same further arguments
_SCATTERS = {
    aten.diagonal.default: aten.diagonal_scatter.default,
    aten.select.int: aten.select_scatter.default,
    aten.slice.Tensor: aten.slice_scatter.default,
}

# view ops that split one dimension into pieces, in order
_PIECES = frozenset(
    {
        aten.chunk.default,
        aten.split.Tensor,
        aten.split.sizes,
        aten.split_with_sizes.default,
        aten.tensor_split.indices,
        aten.tensor_split.sections,
    }
)

_PERMUTATIONS = frozenset(
    {
        aten.mT.default,
        aten.movedim.int,
        aten.movedim.intlist,
        aten.numpy_T.default,
        aten.permute.default,
        aten.swapaxes.default,
        aten.swapdims.default,
        aten.t.default,
        aten.transpose.int,
    }
)

# view ops that keep the row-major order of the base's entries, if they keep their number
_RESHAPES = frozenset(
    {
        aten._unsafe_view.default,
        aten.broadcast_to.default,
        aten.expand.default,
        aten.expand_as.default,
        aten.flatten.using_ints,
        aten.ravel.default,
        aten.reshape.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.view.default,
        aten.view_as.default,
    }
)


def is_view_op(target: Any) -> bool:
    """Whether the op's schema says that its result is, or may be, its first argument's memory."""
    returns = target._schema.returns if dataflow.is_op(target) else ()
    return bool(returns) and returns[0].alias_info is not None and not target._schema.is_mutable


def scattered(view: fx.Node, base: fx.Node, current: fx.Node, new: fx.Node, emit: Emit) -> fx.Node | None:
    """``base``, of which ``current`` is the value, after ``new`` is written to its ``view``; None for other views."""
    picked = dataflow.projection(view)
    op = view if picked is None else picked[0]
    if op.target in _SCATTERS:
        return emit(_SCATTERS[op.target], current, new, *op.args[1:], **op.kwargs)
    if op.target is aten.narrow.default:
        given, _ = arguments_of(op)
        return emit(
            aten.slice_scatter.default, current, new, given["dim"], given["start"], given["start"] + given["length"]
        )
    if op.target is aten.unbind.int:
        return emit(aten.select_scatter.default, current, new, arguments_of(op)[0]["dim"], picked[1])
    if op.target in _PIECES:
        dim = arguments_of(op)[0]["dim"]
        sizes = [piece.shape[dim] for piece in dataflow.values(op)]
        start = sum(sizes[: picked[1]])
        return emit(aten.slice_scatter.default, current, new, dim, start, start + sizes[picked[1]])
    if op.target in _PERMUTATIONS:
        order = _order(op)
        return emit(aten.permute.default, new, [order.index(dim) for dim in range(len(order))])
    if op.target in _RESHAPES and prod(dataflow.shape(view)) == prod(dataflow.shape(base)):
        return emit(aten.reshape.default, new, list(dataflow.shape(base)))
    if _is_same(view, base):
        return emit(aten.alias.default, new)
    return None


def written_by_number(views: Sequence[fx.Node], root: fx.Node, current: fx.Node, new: fx.Node, emit: Emit) -> fx.Node:
    """``root``, of which ``current`` is the value, after ``new`` is written to a view of it, made by the ops ``views``.

    The entries of the root are numbered, and the ops are applied to their numbers.
    """
    shape = list(dataflow.shape(root))
    numbers = emit(aten.arange.default, prod(shape), device=dataflow.value(root).device)
    numbers = emit(aten.reshape.default, numbers, shape)
    for view in views:
        base = view.all_input_nodes[0]
        args = fx.map_arg(view.args, lambda x, b=base, n=numbers: n if x is b else x)
        numbers = emit(view.target, *args, **view.kwargs)
    whole = emit(aten.reshape.default, current, [-1])
    at, rows = (emit(aten.reshape.default, x, [-1]) for x in (numbers, new))
    return emit(aten.reshape.default, emit(aten.scatter.src, whole, 0, at, rows), shape)


def why_not_by_number(views: Sequence[fx.Node], root: fx.Node) -> fx.Node | None:
    """The first view of the chain that does not only pick entries of what it is a view of; None if all do."""
    source = root
    for view in views:
        pieces = dataflow.projection(view) is not None
        if not pieces and not is_view_op(view.target):
            return view
        if dataflow.values(view)[0].dtype != dataflow.values(source)[0].dtype:
            return view  # it reads the entries' bits as something else
        if view.target is aten.as_strided.default and not dataflow.value(root).is_contiguous():
            return view  # it counts in memory, where the numbers are not laid out like the root
        source = view
    return None


def _order(view: fx.Node) -> list[int]:
    """Which dimension of its base each dimension of a permuted view is."""
    sizes = range(2, 2 + len(dataflow.shape(view)))  # all different
    permuted = view.target(torch.empty(*sizes, device="meta"), *view.args[1:], **view.kwargs)
    return [size - 2 for size in permuted.shape]


def _is_same(view: fx.Node, base: fx.Node) -> bool:
    """Whether a view is its base unchanged: a no-op, as ``x.contiguous()`` often is."""
    if not dataflow.is_tensor(view) or not dataflow.is_tensor(base):
        return False
    x, y = dataflow.value(view), dataflow.value(base)
    return _layout(x) == _layout(y)


def _layout(x: torch.Tensor) -> tuple[Any, ...]:
    return x.dtype, x.shape, x.stride(), x.storage_offset()
