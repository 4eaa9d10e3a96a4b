"""Slices, single entries, splits, concatenation, padding: pieces of a dimension, each index with its owner."""

from __future__ import annotations

import operator
from itertools import accumulate, pairwise
from typing import Any

import torch

import sptransform.ops  # noqa: F401 - registers the ops this table names
from sptransform.rules.factors import dim_of, dims_and_sizes
from sptransform.rules.rule import OpCall, OpRule, Resize, RuleFn
from sptransform.rules.table import Local, OpEntry
from sptransform.sharding.partition import Partition
from sptransform.sharding.sizes import Size

aten, sp = torch.ops.aten, torch.ops.sptransform


_LINEAR = (frozenset({0}),)


def start_of_slice(call: OpCall, dim: int) -> Size:
    size, start = call.operand_shapes[0][dim], call.argument("start") or 0
    if isinstance(size, int) and isinstance(start, int):
        return slice(start, None).indices(size)[0]
    return size + start if isinstance(start, int) and start < 0 else start


def _bounds_of_slice(call: OpCall, dim: int) -> tuple[Size, Size, int]:
    """Start, stop and step. ``stop`` is computed from the result's size; it is exact for step 1."""
    start, step = start_of_slice(call, dim), call.argument("step")
    return start, start + call.result_shapes[0][dim] * step, step


def slice_(call: OpCall) -> OpRule | None:
    """Other dimensions pass. With step 1 the sliced one keeps its axis, and every index keeps its owner."""
    shape = call.operand_shapes[0]
    dim = call.argument("dim") % len(shape)
    start, stop, step = _bounds_of_slice(call, dim)
    dims, sizes = dims_and_sizes(shape)
    factor = f"i{dim}"
    if not dims[dim] and call.result_shapes[0][dim] != 1:  # nothing is left of one entry
        result = (*dims[:dim], dim_of("none", 0), *dims[dim + 1 :])
        return OpRule((dims,), (result,), sizes | {"none": 0}, replicated=frozenset({"none"}), linear=_LINEAR)
    if not dims[dim] or (start, stop, step) == (0, shape[dim], 1):
        return OpRule((dims,), (dims,), sizes, linear=_LINEAR)
    if step != 1:
        sizes["taken"] = call.result_shapes[0][dim]
        result = (*dims[:dim], dim_of("taken", sizes["taken"]), *dims[dim + 1 :])
        return OpRule((dims,), (result,), sizes, replicated=frozenset({factor, "taken"}), linear=_LINEAR)
    return OpRule((dims,), (dims,), sizes, linear=_LINEAR, resize={("result", 0, factor): piece_of(start, stop)})


def piece_of(start: Size, stop: Size) -> Resize:
    """Indices ``start .. stop - 1``: every index keeps its owner."""
    return Resize(lambda p: p.slice(start, stop), start=start)


def num_owned_below(bound: Size, local: Local) -> Size:
    owned = local.decision.partition.owned[local.rank]
    return sum(max(min(hi, bound) - lo, 0) for lo, hi in owned)


def _slice_local(call: OpCall, local: Local) -> Any:
    dim = call.argument("dim") % len(call.operand_shapes[0])
    if local.decision.factor != f"i{dim}" or not local.rule.resize:  # without resize the slice is the full dimension
        return local.run(call)
    start, stop, _ = _bounds_of_slice(call, dim)
    return local.run(call, start=num_owned_below(start, local), end=num_owned_below(stop, local))


def select(call: OpCall) -> OpRule:
    """Other dimensions pass. The owner of the selected entry has it, others zeros: a pending sum."""
    shape = call.operand_shapes[0]
    dim = call.argument("dim") % len(shape)
    operand, sizes = dims_and_sizes(shape)
    result = (*operand[:dim], *operand[dim + 1 :])
    return OpRule((operand,), (result,), sizes, reduce=frozenset({f"i{dim}"} & set(sizes)), linear=_LINEAR)


def _select_local(call: OpCall, local: Local) -> Any:
    dim = call.argument("dim") % len(call.operand_shapes[0])
    if local.decision.factor != f"i{dim}":
        return local.run(call)
    entry = _owned_entry(local, dim, call.argument("index") % call.operand_shapes[0][dim])
    return local.emit(aten.squeeze.dim, (entry, dim), {})


def _owned_entry(local: Local, dim: int, index: int) -> Any:
    """Entry ``index`` of the whole operand along ``dim``, or zeros where another rank owns it."""
    emit, x = local.emit, local.operands[0]
    partition = local.decision.partition.tiled(local.decision.outer)
    if not partition.local_size(local.rank):  # there has to be an entry to read; it is masked below
        flat = [0] * (2 * (len(local.operand_shapes[0]) - dim))
        x = emit(aten.constant_pad_nd.default, (x, [*flat[:-1], 1]), {})
    wanted = emit(aten.new_full.default, (x, [1], index), {"dtype": torch.int64})
    at = emit(sp.local_index.default, (wanted, str(partition), local.group), {})
    entry = emit(aten.index_select.default, (x, dim, emit(aten.clamp.default, (at, 0), {})), {})
    shape = [1] * len(local.operand_shapes[0])
    is_own = emit(aten.reshape.default, (emit(aten.ge.Scalar, (at, 0), {}), shape), {})
    return emit(aten.where.ScalarOther, (is_own, entry, 0.0), {})


def split(call: OpCall) -> OpRule:
    """Other dimensions pass. Each piece is a slice of the split one; a piece of one entry is as from :func:`select`.

    If no piece has more, the split dimension must be whole.
    """
    shape = call.operand_shapes[0]
    dim = call.argument("dim") % len(shape)
    operand, sizes = dims_and_sizes(shape)
    bounds = list(accumulate((piece[dim] for piece in call.result_shapes), initial=0))
    single = (*operand[:dim], (), *operand[dim + 1 :])
    results = tuple(single if piece[dim] == 1 else operand for piece in call.result_shapes)
    if operand not in results or operand == single:
        replicated = frozenset({f"i{dim}"})
        return OpRule((operand,), results, sizes, replicated=replicated, linear=_LINEAR)
    pieces = zip(results, pairwise(bounds), strict=True)
    resize = {
        ("result", index, f"i{dim}"): piece_of(start, stop) for index, (_, (start, stop)) in enumerate(pieces)
        if results[index] is operand
    }  # fmt: skip
    reduce = frozenset({f"i{dim}"} if single in results else ())
    return OpRule((operand,), results, sizes, linear=_LINEAR, resize=resize, reduce=reduce)


def _split_local(call: OpCall, local: Local) -> Any:
    dim = call.argument("dim") % len(call.operand_shapes[0])
    if local.decision.factor != f"i{dim}":
        return local.run(call)
    bounds = list(accumulate((piece[dim] for piece in call.result_shapes), initial=0))
    sizes = [hi - lo for lo, hi in pairwise(num_owned_below(bound, local) for bound in bounds)]
    split = local.emit(aten.split_with_sizes.default, (local.operands[0], sizes, dim), {})
    if all(piece[dim] != 1 for piece in call.result_shapes):
        return split
    return [
        _owned_entry(local, dim, start) if piece[dim] == 1 else local.emit(operator.getitem, (split, index), {})
        for index, (piece, start) in enumerate(zip(call.result_shapes, bounds, strict=False))
    ]


def unbind(call: OpCall) -> OpRule:
    """Other dimensions pass; the removed one must be whole."""
    shape = call.operand_shapes[0]
    dim = call.argument("dim") % len(shape)
    operand, sizes = dims_and_sizes(shape)
    results = ((*operand[:dim], *operand[dim + 1 :]),) * len(call.result_shapes)
    return OpRule((operand,), results, sizes, replicated=frozenset({f"i{dim}"}), linear=_LINEAR)


def cat(call: OpCall) -> OpRule | None:
    """Other dimensions pass. Every operand is a slice of the result along the concatenated one; one entry is whole.

    None with old-style empty 1-D operands. With empty ones of more dimensions the concatenated one must be whole.
    """
    target = call.result_shapes[0]
    if any(len(shape) != len(target) for shape in call.operand_shapes):
        return None
    dim = call.argument("dim") % len(target)
    result, sizes = dims_and_sizes(target)
    bounds = accumulate((shape[dim] for shape in call.operand_shapes), initial=0)
    single = (*result[:dim], (), *result[dim + 1 :])
    operands = tuple(single if shape[dim] == 1 else result for shape in call.operand_shapes)
    resize, replicated = {}, frozenset()
    if target[dim] == 1:  # one entry, beside operands without any
        operands = tuple(
            single if shape[dim] == 1 else (*result[:dim], ("none",), *result[dim + 1 :])
            for shape in call.operand_shapes
        )
        is_alone = all(shape[dim] == 1 for shape in call.operand_shapes)
        sizes, replicated = (sizes, replicated) if is_alone else (sizes | {"none": 0}, frozenset({"none"}))
    elif len(operands) > 1:
        for index, (start, stop) in enumerate(pairwise(bounds)):
            if operands[index] is result:
                resize["operand", index, f"i{dim}"] = piece_of(start, stop)
        if any(shape[dim] == 0 for shape in call.operand_shapes):
            replicated = frozenset({f"i{dim}"})
    everything = (frozenset(range(len(operands))),)
    return OpRule(operands, (result,), sizes, replicated=replicated, linear=everything, resize=resize)


def _cat_local(call: OpCall, local: Local) -> Any:
    """Of an operand with one entry, which all ranks have, those that do not own it take an empty slice."""
    dim = call.argument("dim") % len(call.result_shapes[0])
    if local.decision.factor != f"i{dim}":
        return local.run(call)
    bounds = accumulate((shape[dim] for shape in call.operand_shapes), initial=0)
    parts = list(local.operands)
    for index, (start, stop) in enumerate(pairwise(bounds)):
        if call.operand_shapes[index][dim] == 1:
            num = num_owned_below(stop, local) - num_owned_below(start, local)
            parts[index] = local.emit(aten.slice.Tensor, (parts[index], dim, 0, num), {})
    return local.emit(aten.cat.default, (parts, dim), {})


def stack(call: OpCall) -> OpRule:
    """Adds a dimension with one entry per operand."""
    target = call.result_shapes[0]
    dim = call.argument("dim") % len(target)
    result, sizes = dims_and_sizes(target)
    operand = (*result[:dim], *result[dim + 1 :])
    num = len(call.operand_shapes)
    linear = (frozenset(range(num)),)
    return OpRule((operand,) * num, (result,), sizes, replicated=frozenset({f"i{dim}"}), linear=linear)


def pad(call: OpCall) -> OpRule | None:
    """Constant padding: a padded dimension keeps its axis; the owners of its ends own the padding.

    Negative amounts cut. A dimension that is padded at one end and cut at the other is shifted: it is ordered. One that
    has or gets size 0 or 1 stays whole. None for other modes.
    """
    if call.target is aten.pad.default and call.argument("mode") != "constant":
        return None
    amounts = _pad_amounts(call)
    shape = call.operand_shapes[0]
    dims, sizes = dims_and_sizes(shape)
    result, resize, replicated = list(dims), {}, set()
    for dim, (before, after) in amounts.items():
        if shape[dim] in (0, 1) or call.result_shapes[0][dim] in (0, 1):
            sizes[f"p{dim}"] = call.result_shapes[0][dim]
            result[dim] = dim_of(f"p{dim}", sizes[f"p{dim}"])
            replicated.update(dims[dim], result[dim])
            continue
        resize["result", 0, f"i{dim}"] = Resize(
            lambda p, before=before, after=after: _padded(p, before, after), padded=True
        )
    ordered = frozenset(f"i{dim}" for dim, (before, after) in amounts.items() if before * after < 0)
    return OpRule(
        (dims,), (tuple(result),), sizes, replicated=frozenset(replicated), resize=resize, ordered=ordered - replicated
    )


def _padded(partition: Partition, before: int, after: int) -> Partition:
    found = partition.pad(max(before, 0), max(after, 0))
    return found.slice(max(-before, 0), found.size - max(-after, 0)) if min(before, after) < 0 else found


def _pad_amounts(call: OpCall) -> dict[int, tuple[int, int]]:
    """dim -> (before, after) for the dimensions that are padded."""
    flat = call.argument("pad")
    ndim = len(call.operand_shapes[0])
    pairs = ((ndim - 1 - i, (flat[2 * i], flat[2 * i + 1])) for i in range(len(flat) // 2))
    return {dim: pair for dim, pair in pairs if pair != (0, 0)}


def _pad_local(call: OpCall, local: Local) -> Any:
    flat = list(call.argument("pad"))
    ndim = len(call.operand_shapes[0])
    for dim in _pad_amounts(call):
        if local.decision.factor == f"i{dim}":
            partition = local.decision.partition
            owned = partition.owned[local.rank]
            at = 2 * (ndim - 1 - dim)
            before, after = flat[at : at + 2]
            flat[at], flat[at + 1] = (
                amount if owned and owned[end][end] == edge else min(amount, 0)
                for amount, end, edge in ((before, 0, 0), (after, -1, partition.size))
            )
            # of what is cut, this rank has a part
            if before < 0:
                flat[at] = -num_owned_below(-before, local)
            if after < 0:
                flat[at + 1] = num_owned_below(partition.size + after, local) - partition.local_size(local.rank)
    return local.run(call, pad=flat)


_CAT = OpEntry(cat, _cat_local)
_SPLIT = OpEntry(split, _split_local)

TABLE: list[tuple[Any, OpEntry | RuleFn]] = [
    (aten.cat.default, _CAT),
    (aten.chunk.default, _SPLIT),
    (aten.concatenate.default, _CAT),
    (aten.constant_pad_nd.default, OpEntry(pad, _pad_local)),
    (aten.pad.default, OpEntry(pad, _pad_local)),
    (aten.select.int, OpEntry(select, _select_local)),
    (aten.slice.Tensor, OpEntry(slice_, _slice_local)),
    (aten.split.Tensor, _SPLIT),
    (aten.split_with_sizes.default, _SPLIT),
    (aten.stack.default, stack),
    (aten.unbind.int, unbind),
]
