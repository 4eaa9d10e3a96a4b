"""Replace rows that a mask picks, whose number is data, by whole tensors under that mask::

    %rows = index(%x, [%mask])                      # [?, 32]
    %new = add(%rows, %features)                    %ordinals = which of the picked rows each is
    %y = index_put(%x, [%mask], %new)               %y = where(%mask, %x + index(%features, [%ordinals]), %x)

No size of a sharded graph can be data, but every rank can have a mask. Exact are these:

1. rows picked by a boolean index, or by what ``nonzero`` and ``where`` of a mask give;
2. rows computed each from itself, and from tensors with as many rows (``op_rules/row_ops.py``);
3. rows written back (``index_put``, ``masked_scatter``), added back (``index_add``), or summed (``sum``, ``mean``,
   cross-entropy).

Anything else whose size is data is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

# Private: sizes that torch knows only when a graph runs
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from sptransform.capture.same_values import SameValues
from sptransform.capture.under_masks import UnderMasks, dtype_of, ndim_of
from sptransform.diagnostics.errors import CaptureError, describe
from sptransform.graph import dataflow
from sptransform.graph.calls import arguments_of
from sptransform.graph.edit import succeed
from sptransform.op_rules.row_ops import ENTRYWISE, LAST_DIMS
from sptransform.sharding.sizes import broadcast

aten = torch.ops.aten

_PICKS = (aten.masked_select.default, aten.nonzero.default, aten.nonzero_numpy.default, aten.where.default)
_RESHAPES = (aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten._unsafe_view.default)


def spread_picked_rows(graph: fx.Graph) -> None:
    """Rewrite ``graph`` in place.

    Raises:
        CaptureError: a size that is data remains.
    """
    starts = (aten.index.Tensor, aten.index_put.default, aten.masked_scatter.default)
    if any(node.target in starts or _is_sized_by_data(node) for node in graph.nodes):
        _Spreader(graph).run()


@dataclass(frozen=True)
class _Places:
    """The index of each true entry of ``mask``: a column a dimension (``nonzero``), or a tensor each (``where``)."""

    mask: fx.Node


@dataclass(frozen=True)
class _Rows:
    """A row along ``dim`` for each true entry of ``mask``; ``whole`` has the mask's dimensions there.

    Attributes:
        coordinate: the rows are the indices of the true entries in this dimension of the mask.
    """

    mask: fx.Node
    dim: int
    whole: fx.Node
    coordinate: int | None = None


class _Spreader(UnderMasks):
    def __init__(self, graph: fx.Graph) -> None:
        super().__init__()
        self.graph = graph
        self.found: dict[fx.Node, _Rows | _Places] = {}
        self._same = SameValues()  # a model may compute a mask anew wherever it picks rows

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "call_function":
                self.at = node
                made = self._made(node)
                if isinstance(made, fx.Node):
                    succeed(node, made)
                elif made is not None:
                    self.found[node] = made
        self.graph.eliminate_dead_code()
        for node in self.graph.nodes:
            if node in self.found or _is_sized_by_data(node):
                readers = [
                    user for user in node.users if user not in self.found and user.target is not aten.sym_size.int
                ]
                raise _by_data(node, readers[0] if readers and readers[0].op != "output" else node)

    def _made(self, node: fx.Node) -> fx.Node | _Rows | _Places | None:
        """What the node's op makes of picked rows; a node, if its size is no longer data."""
        target, args = node.target, list(node.args)
        if target in _PICKS and all(map(_is_plain, node.all_input_nodes)):
            if target is not aten.masked_select.default:
                return _Places(self._same.first(self.as_mask(args[0])))
            x, mask = (self.expanded(each, broadcast(*map(dataflow.shape, args))) for each in args)
            return self._picked(x, self._same.first(mask), 0)
        of_whole = {
            aten.index.Tensor: self._index,
            aten.index_put.default: self._index_put,
            aten.masked_scatter.default: self._masked_scatter,
        }
        if target in of_whole:
            return of_whole[target](*args) if _is_plain(args[0]) else None
        sources = [self.found[x] for x in node.all_input_nodes if x in self.found]
        if not sources:
            return None
        if any(isinstance(x, _Places) for x in sources):
            return self._one_index(node, sources[0])
        if len({x.mask for x in sources}) == 1:
            return self._of_rows(node, sources[0].mask)
        return None

    # Rows that are picked

    def _picked(self, x: fx.Node, mask: fx.Node, dim: int) -> _Rows:
        # rows that are not picked are computed too: zero, lest a gradient of zero meets an infinite value
        return _Rows(mask, dim, self.where(mask, dim, x, 0))

    def _one_index(self, node: fx.Node, places: Any) -> fx.Node | _Rows | _Places | None:
        """The places of the true entries in one dimension of the mask, or their number."""
        target, args = node.target, node.args
        if target is aten.sym_size.int and args[1] == 0:
            return self._count(node, places.mask)
        if target is aten.unbind.int and arguments_of(node)[0]["dim"] in (1, -1):
            return places
        if target is aten.select.int and args[1] in (1, -1):
            dim = args[2]
        elif target is operator.getitem:
            dim = args[1]
        else:
            return None
        shape = dataflow.shape(places.mask)
        numbers = self.emit(aten.arange.default, shape[dim], device=dataflow.value(places.mask).device)
        alone = self.emit(
            aten.reshape.default, numbers, [n if d == dim % len(shape) else 1 for d, n in enumerate(shape)]
        )
        return _Rows(places.mask, 0, self.emit(aten.expand.default, alone, list(shape)), dim % len(shape))

    def _index(self, x: fx.Node, indices: Sequence[Any]) -> _Rows | None:
        given = {dim: index for dim, index in enumerate(indices) if index is not None}
        first = min(given)
        if len(given) == 1 and self._is_mask(given[first]):
            return self._picked(x, self._same.first(given[first]), first)
        rows = [self.found.get(index) for index in given.values()]
        if not all(isinstance(each, _Rows) and each.dim == 0 for each in rows):
            return None
        if len({each.mask for each in rows}) > 1 or list(given) != list(range(first, first + len(given))):
            return None
        mask, shape = rows[0].mask, dataflow.shape(x)
        extents = dataflow.shape(mask)
        by = {each.coordinate: dim for dim, each in zip(given, rows, strict=True)}
        if None in by or len(by) < len(rows) or any(shape[dim] != extents[at] for at, dim in by.items()):
            # an index that is not picked may be out of range
            at = [self.where(mask, 0, each.whole, 0) for each in rows]
            return _Rows(mask, first, self.emit(aten.index.Tensor, x, [*[None] * first, *at]))
        order = [*range(first), *(by[at] for at in sorted(by)), *range(first + len(by), len(shape))]
        whole = x if order == sorted(order) else self.emit(aten.permute.default, x, order)
        for at in range(len(extents)):
            if at not in by:
                whole = self.emit(aten.unsqueeze.default, whole, first + at)
        spread = [*shape[:first], *extents, *shape[first + len(by) :]]
        return self._picked(self.expanded(whole, spread), mask, first)

    # Rows that are computed from rows

    def _of_rows(self, node: fx.Node, mask: fx.Node) -> fx.Node | _Rows | None:
        target = node.target
        args, _ = arguments_of(node)
        first = self.found.get(node.args[0])
        more = len(dataflow.shape(mask)) - 1
        if target is aten.sym_size.int and args["dim"] % ndim_of(node.args[0]) == first.dim:
            return self._count(node, mask)
        if target in ENTRYWISE:
            return self._entrywise(node, mask)
        if target is aten.cross_entropy_loss.default:
            return self._cross_entropy(args, mask)
        if target is aten.index_add.default:
            return self._index_add(args, mask)
        if first is None or sum(x in self.found for x in node.all_input_nodes) > 1:
            return None
        behind = ndim_of(node.args[0]) - first.dim - 1
        if target in LAST_DIMS and LAST_DIMS[target](node.args) <= behind:
            return _Rows(mask, first.dim, self.emit(target, first.whole, *node.args[1:], **node.kwargs))
        if target is aten.unsqueeze.default:
            dim = args["dim"] % (ndim_of(node.args[0]) + 1)
            is_before = dim <= first.dim
            whole = self.emit(target, first.whole, dim if is_before else dim + more)
            return _Rows(mask, first.dim + is_before, whole)
        if target in _RESHAPES:
            return self._reshaped(node, first)
        if target in (aten.sum.default, aten.mean.default, aten.sum.dim_IntList, aten.mean.dim):
            return self._reduced(node, args, first)
        return None

    def _entrywise(self, node: fx.Node, mask: fx.Node) -> _Rows | None:
        dims = {self.found[x].dim - ndim_of(x) for x in node.all_input_nodes if x in self.found}
        (place,) = dims if len(dims) == 1 else (None,)
        if place is None:
            raise _by_data(node, node)
        if not all(x in self.found or _is_plain(x) for x in node.all_input_nodes):
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda x: self._whole(x, mask, -place - 1))
        return _Rows(mask, ndim_of(node) + place, self.emit(node.target, *args, **kwargs))

    def _reshaped(self, node: fx.Node, rows: _Rows) -> _Rows | None:
        """Dimensions of size 1 before the rows come and go; the others stay."""
        old, new = dataflow.value(node.args[0]).shape, dataflow.value(node).shape
        before = [dim for dim, size in enumerate(new) if not isinstance(size, int)]
        if any(isinstance(size, torch.SymInt) for size in old[: rows.dim]):
            return None
        if prod(old[: rows.dim]) != 1 or len(before) != 1 or prod(new[: before[0]]) != 1:
            return None
        # compared as they are written: nothing is known of them
        if new[before[0]].node.expr != old[rows.dim].node.expr:
            return None
        behind = list(new[before[0] + 1 :])
        shape = [*[1] * before[0], *dataflow.shape(rows.mask), *behind]
        return _Rows(rows.mask, before[0], self.emit(aten.reshape.default, rows.whole, shape))

    def _reduced(self, node: fx.Node, args: dict[str, Any], rows: _Rows) -> fx.Node | _Rows | None:
        ndim = ndim_of(node.args[0])
        given = args.get("dim")
        dims = sorted(dim % ndim for dim in given) if given else list(range(ndim))
        inner = [dim - ndim for dim in dims if dim > rows.dim]
        if rows.dim not in dims:
            if len(inner) < len(dims):
                return None
            return _Rows(rows.mask, rows.dim, self.emit(node.target, rows.whole, inner, *node.args[2:], **node.kwargs))
        if args.get("keepdim"):
            return None
        masked = self.where(rows.mask, rows.dim, rows.whole, 0)
        over = list(range(rows.dim, rows.dim + len(dataflow.shape(rows.mask))))
        outer = [dim for dim in dims if dim < rows.dim]
        total = self.emit(aten.sum.dim_IntList, masked, [*outer, *over, *inner], dtype=args["dtype"])
        if node.target in (aten.sum.default, aten.sum.dim_IntList):
            return total
        shape = dataflow.shape(rows.whole)
        count = self.emit(
            aten.mul.Tensor, self.count(rows.mask), prod([*(shape[d] for d in outer), *(shape[d] for d in inner)])
        )
        return self.emit(aten.div.Tensor, total, count)

    def _cross_entropy(self, args: dict[str, Any], mask: fx.Node) -> fx.Node | _Rows | None:
        """What is not picked is ignored."""
        logits, labels = self._whole(args["self"], mask, 1), self._whole(args["target"], mask, 0)
        if args["label_smoothing"] and args["weight"] is not None:
            return None
        if logits is None or labels is None or len(dataflow.shape(labels)) != len(dataflow.shape(mask)):
            return None
        labels = self.where(mask, 0, labels, args["ignore_index"])
        logits = self.emit(aten.reshape.default, logits, [-1, dataflow.shape(logits)[-1]])
        rest = args["weight"], args["reduction"], args["ignore_index"], args["label_smoothing"]
        loss = self.emit(aten.cross_entropy_loss.default, logits, self.emit(aten.reshape.default, labels, [-1]), *rest)
        if args["reduction"] != 0:
            return loss
        return _Rows(mask, 0, self.emit(aten.reshape.default, loss, list(dataflow.shape(mask))))

    def _count(self, node: fx.Node, mask: fx.Node) -> fx.Node:
        """The number of rows. That it is from 0 to the number of all, as torch has graphs assert, needs no check."""
        most = prod(dataflow.shape(mask))
        known = ((operator.ge, (node, 0)), (operator.le, (node, most)))
        for reader in list(node.users):
            if (reader.target, reader.args) in known and all(
                x.target is aten._assert_scalar.default for x in reader.users
            ):
                for check in list(reader.users):
                    self.graph.erase_node(check)
                self.graph.erase_node(reader)
        return self.emit(aten.item.default, self.count(mask))

    # Rows that return to whole tensors

    def _index_put(
        self, x: fx.Node, indices: Sequence[Any], values: fx.Node, accumulate: bool = False
    ) -> fx.Node | None:
        given = {dim: index for dim, index in enumerate(indices) if index is not None}
        first = min(given)
        if len(given) == 1 and self._is_mask(given[first]):
            mask = self._same.first(given[first])
        else:
            rows = [self.found.get(index) for index in given.values()]
            if len({getattr(each, "mask", None) for each in rows}) > 1:
                return None
            coordinates = [each.coordinate if isinstance(each, _Rows) else None for each in rows]
            if None in coordinates or coordinates != list(range(len(dataflow.shape(rows[0].mask)))):
                return None
            mask = rows[0].mask
            if list(given) != list(range(first, first + len(given))):
                return None
        extents = dataflow.shape(mask)
        if dataflow.shape(x)[first : first + len(extents)] != extents:
            return None
        if (whole := self._whole(values, mask, len(dataflow.shape(x)) - first - len(extents))) is None:
            return None
        if accumulate:
            return self.emit(aten.add.Tensor, x, self.where(mask, first, whole, 0))
        return self.where(mask, first, whole, x)

    def _masked_scatter(self, x: fx.Node, mask: fx.Node, source: fx.Node) -> fx.Node | None:
        """``source`` in the order of the mask's true entries. Dimensions along which the mask repeats are one row."""
        shape, own = dataflow.shape(x), dataflow.shape(mask)
        if source in self.found:
            rows = self.found[source]
            is_same = (
                isinstance(rows, _Rows)
                and rows.mask is self._same.first(mask)
                and own == shape == dataflow.shape(rows.whole)
            )
            return self.where(mask, 0, rows.whole, x) if is_same else None
        if not _is_plain(source) or broadcast(shape, own) != shape or len(own) != len(shape):
            return None
        strides = dataflow.value(mask).stride()
        num_outer = len(own)
        while num_outer and (own[num_outer - 1] == 1 or strides[num_outer - 1] == 0):
            num_outer -= 1
        row, num = list(shape[num_outer:]), prod(dataflow.shape(source))
        if num % prod(row) != 0 or num == 0 or own[:num_outer] != shape[:num_outer]:
            return None
        for _ in row:
            mask = self.emit(aten.select.int, mask, -1, 0)
        values = self.emit(aten.reshape.default, source, [num // prod(row), *row])
        return self.where(mask, 0, self.spread(values, 0, mask, aten.le.Scalar), x)

    def _index_add(self, args: dict[str, Any], mask: fx.Node) -> fx.Node | None:
        at, rows, dim = self.found.get(args["index"]), self.found.get(args["source"]), args["dim"]
        if not isinstance(at, _Rows) or at.coordinate is None or not isinstance(rows, _Rows) or rows.dim != dim:
            return None
        if not _is_plain(args["self"]) or dataflow.shape(args["self"])[dim] != dataflow.shape(mask)[at.coordinate]:
            return None
        masked = self.where(mask, dim, rows.whole, 0)
        others = [dim + d for d in range(len(dataflow.shape(mask))) if d != at.coordinate]
        total = self.emit(aten.sum.dim_IntList, masked, others) if others else masked
        return self.emit(aten.add.Tensor, args["self"], total, alpha=args["alpha"])

    def _is_mask(self, x: Any) -> bool:
        return x not in self.found and _is_plain(x) and dtype_of(x) == torch.bool

    def _whole(self, x: fx.Node, mask: fx.Node, behind: int) -> fx.Node | None:
        """Rows, with ``behind`` dimensions behind theirs, as a whole tensor; or what broadcasts to it."""
        if x in self.found:
            rows = self.found[x]
            fits = isinstance(rows, _Rows) and rows.mask is mask and ndim_of(x) - rows.dim - 1 == behind
            return rows.whole if fits else None
        if not _is_plain(x):
            return None
        return x if ndim_of(x) <= behind else self.spread(x, ndim_of(x) - behind - 1, mask)


def _is_plain(x: fx.Node) -> bool:
    """Whether this is a tensor whose size is not data."""
    return dataflow.is_tensor(x) and not _is_sized_by_data(x)


def _is_sized_by_data(node: fx.Node) -> bool:
    return any(free_unbacked_symbols(value) for value in dataflow.values(node))


def _by_data(node: fx.Node, reader: fx.Node) -> CaptureError:
    return CaptureError(
        describe(
            "a size depends on what a tensor holds, and the ranks have to share it before they know it",
            node=reader,
            found=f"%{node.name}, made by {node.target}",
            fix="compute all rows, and write or sum those that count: torch.where(mask, rows, x), "
            "F.cross_entropy(.., ignore_index=..)",
        )
    )
