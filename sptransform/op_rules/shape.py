"""Views, permutations, expansions, slices, concatenation: where each dimension of the result comes from."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch

import sptransform.ops  # noqa: F401 - registers the ops this table names
from sptransform.rules.factors import dim_of, dims_and_sizes, dims_of
from sptransform.rules.rule import Dims, OpCall, OpRule, Resize, RuleFn, Shape
from sptransform.rules.table import Local, OpEntry
from sptransform.sharding.partition import Partition
from sptransform.sharding.sizes import Size, order, quotient

aten, sp = torch.ops.aten, torch.ops.sptransform


_LINEAR = (frozenset({0}),)


def _bounds(shape: Shape) -> list[Size]:
    """Products of trailing sizes: the strides at which a row-major index carries into the next dimension."""
    bounds = [1]
    for size in reversed(shape):
        bounds.append(bounds[-1] * size)
    return bounds


def reshape(call: OpCall) -> OpRule | None:
    """Row-major reshape: both shapes as products of common factors, ``[B, S, V] -> [(B S), V]``.

    Where the strides of the two shapes do not nest (``[2, 3] -> [3, 2]``), those dimensions share no factor and
    must stay replicated. None for empty tensors.
    """
    source, target = call.operand_shapes[0], call.result_shapes[0]
    if 0 in source:
        return None
    bounds = sorted({*_bounds(source), *_bounds(target)}, key=order)
    common = sorted(set(_bounds(source)) & set(_bounds(target)), key=order)
    factors: list[tuple[str, Size, Size]] = []  # name, stride, size
    opaque: list[tuple[Size, Size]] = []
    for lo, hi in pairwise(common):
        inside = [b for b in bounds if order(lo) <= order(b) <= order(hi)]
        pairs = list(pairwise(inside))
        ratios = [quotient(b, a) for a, b in pairs]
        if None not in ratios:
            factors.extend((f"f{a}", a, ratio) for (a, _), ratio in zip(pairs, ratios, strict=True))
        else:
            opaque.append((lo, hi))
    sizes = {name: size for name, _, size in factors}

    def dims(shape: Shape, side: str) -> Dims:
        found = []
        stride = 1
        for size in reversed(shape):
            top = stride * size
            if any(order(lo) <= order(stride) and order(top) <= order(hi) for lo, hi in opaque) and size != 1:
                name = f"{side}{stride}"
                sizes[name] = size
                found.append((name,))
            else:
                found.append(tuple(n for n, s, _ in reversed(factors) if order(stride) <= order(s) < order(top)))
            stride = top
        return tuple(reversed(found))

    operand, result = dims(source, "o"), dims(target, "r")
    replicated = frozenset(name for name in sizes if not name.startswith("f"))
    return OpRule((operand,), (result,), sizes, replicated=replicated, linear=_LINEAR)


def view_as(call: OpCall) -> OpRule | None:
    """Only the shape of the second operand is read."""
    base = reshape(call)
    return None if base is None else replace(base, operands=(base.operands[0], base.results[0]), unread=frozenset({1}))


def _reshape_local(call: OpCall, local: Local) -> Any:
    # reshape, not view: a view that is legal on the global tensor may be illegal on a shard's strides
    return local.emit(aten.reshape.default, (local.operands[0], list(local.result_shapes[0])), {})


def _permuted(order_of: Callable[[OpCall, int], list[int]]) -> RuleFn:
    def apply(call: OpCall) -> OpRule:
        shape = call.operand_shapes[0]
        operand, sizes = dims_and_sizes(shape)
        result = tuple(operand[d] for d in order_of(call, len(shape)))
        return OpRule((operand,), (result,), sizes, linear=_LINEAR)

    return apply


def _swap(call: OpCall, ndim: int) -> list[int]:
    order = list(range(ndim))
    if call.target in (aten.t.default, aten.numpy_T.default):
        return order[::-1]
    if call.target is aten.mT.default:
        return [*order[:-2], order[-1], order[-2]]
    a, b = call.argument("dim0") % ndim, call.argument("dim1") % ndim
    order[a], order[b] = order[b], order[a]
    return order


def _moved_dim(call: OpCall, ndim: int) -> list[int]:
    order, source = list(range(ndim)), call.argument("source") % ndim
    order.insert(call.argument("destination") % ndim, order.pop(source))
    return order


def expand(call: OpCall) -> OpRule:
    """Dimensions of size 1 grow; the grown ones are factors of the result only."""
    source, target = call.operand_shapes[0], call.result_shapes[0]
    result, sizes = dims_and_sizes(target)
    operand = dims_of(source, [f"i{d}" for d in range(len(target) - len(source), len(target))])
    return OpRule((operand,), (result,), sizes, linear=_LINEAR)


def _expand_local(call: OpCall, local: Local) -> Any:
    return local.emit(aten.expand.default, (local.operands[0], list(local.result_shapes[0])), {})


def repeat_interleave(call: OpCall) -> OpRule | None:
    """``[.., k, ..] -> [.., (k repeats), ..]``; None for the form that flattens several dimensions."""
    shape, dim = call.operand_shapes[0], call.argument("dim")
    if dim is None and len(shape) != 1:
        return None
    dim, repeats = (dim or 0) % len(shape), call.argument("repeats")
    operand, sizes = dims_and_sizes(shape)
    result = (*operand[:dim], (*operand[dim], *dim_of("g", repeats)), *operand[dim + 1 :])
    return OpRule((operand,), (result,), sizes | {"g": repeats}, linear=_LINEAR)


def _repeat_interleave_local(call: OpCall, local: Local) -> Any:
    source, repeats = call.operand_shapes[0], call.argument("repeats")
    if local.decision.factor == "g":
        dim = (call.argument("dim") or 0) % len(source)
        repeats = local.result_shapes[0][dim] // source[dim]
    return local.run(call, repeats=repeats, output_size=None)


def repeat(call: OpCall) -> OpRule:
    """Tiling: a tiled dimension is ``(copy, index)``; the copies are a factor of the result only."""
    source, repeats = call.operand_shapes[0], call.argument("repeats")
    lead = len(repeats) - len(source)
    operand, sizes = dims_and_sizes(source, [f"i{d}" for d in range(lead, len(repeats))])
    padded = ((),) * lead + operand
    result = tuple((*dim_of(f"g{d}", n), *own) for d, (n, own) in enumerate(zip(repeats, padded, strict=True)))
    return OpRule((operand,), (result,), sizes | {f"g{d}": n for d, n in enumerate(repeats)}, linear=_LINEAR)


def _repeat_local(call: OpCall, local: Local) -> Any:
    shape = local.result_shapes[0]
    source = call.operand_shapes[0]
    lead = len(shape) - len(source)
    repeats = list(call.argument("repeats"))
    dim = next(d for d, factors in enumerate(local.rule.results[0]) if local.decision.factor in factors)
    if local.decision.factor.startswith("g"):
        repeats[dim] = shape[dim] // (source[dim - lead] if dim >= lead else 1)
    return local.run(call, repeats=repeats)


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
    """Other dimensions pass. With step 1 the sliced one keeps its axis, and every index keeps its owner.

    None for an empty slice of a dimension of size 1.
    """
    shape = call.operand_shapes[0]
    dim = call.argument("dim") % len(shape)
    start, stop, step = _bounds_of_slice(call, dim)
    dims, sizes = dims_and_sizes(shape)
    factor = f"i{dim}"
    if not dims[dim] and call.result_shapes[0][dim] != 1:
        return None
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

    Negative amounts cut. A dimension that is padded at one end and cut at the other is shifted: it is ordered. None for
    other modes, and if a padded dimension has or gets size 0 or 1.
    """
    if call.target is aten.pad.default and call.argument("mode") != "constant":
        return None
    amounts = _pad_amounts(call)
    shape = call.operand_shapes[0]
    dims, sizes = dims_and_sizes(shape)
    resize = {}
    for dim, (before, after) in amounts.items():
        if shape[dim] in (0, 1) or call.result_shapes[0][dim] in (0, 1):
            return None
        resize["result", 0, f"i{dim}"] = Resize(
            lambda p, before=before, after=after: _padded(p, before, after), padded=True
        )
    ordered = frozenset(f"i{dim}" for dim, (before, after) in amounts.items() if before * after < 0)
    return OpRule((dims,), (dims,), sizes, resize=resize, ordered=ordered)


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
_RESHAPE = OpEntry(reshape, _reshape_local)
_SPLIT = OpEntry(split, _split_local)
_SWAP = OpEntry(_permuted(_swap))

TABLE: list[tuple[Any, OpEntry | RuleFn]] = [
    (aten._reshape_alias.default, _RESHAPE),
    (aten._unsafe_view.default, _RESHAPE),
    (aten.cat.default, _CAT),
    (aten.chunk.default, _SPLIT),
    (aten.concatenate.default, _CAT),
    (aten.constant_pad_nd.default, OpEntry(pad, _pad_local)),
    (aten.expand.default, OpEntry(expand, _expand_local)),
    (aten.flatten.using_ints, _RESHAPE),
    (aten.mT.default, _SWAP),
    (aten.movedim.int, OpEntry(_permuted(_moved_dim))),
    (aten.numpy_T.default, _SWAP),
    (aten.pad.default, OpEntry(pad, _pad_local)),
    (aten.permute.default, OpEntry(_permuted(lambda call, ndim: [d % ndim for d in call.argument("dims")]))),
    (aten.repeat.default, OpEntry(repeat, _repeat_local)),
    (aten.repeat_interleave.self_int, OpEntry(repeat_interleave, _repeat_interleave_local)),
    (aten.reshape.default, _RESHAPE),
    (aten.select.int, OpEntry(select, _select_local)),
    (aten.slice.Tensor, OpEntry(slice_, _slice_local)),
    (aten.split.Tensor, _SPLIT),
    (aten.split_with_sizes.default, _SPLIT),
    (aten.squeeze.default, _RESHAPE),
    (aten.squeeze.dim, _RESHAPE),
    (aten.squeeze.dims, _RESHAPE),
    (aten.stack.default, stack),
    (aten.t.default, _SWAP),
    (aten.transpose.int, _SWAP),
    (aten.unbind.int, unbind),
    (aten.unflatten.int, _RESHAPE),
    (aten.unsqueeze.default, _RESHAPE),
    (aten.view.default, _RESHAPE),
    (aten.view_as.default, OpEntry(view_as, _reshape_local)),
]
