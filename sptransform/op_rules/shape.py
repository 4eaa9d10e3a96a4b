"""Views, permutations, expansions, repeats: where each dimension of the result comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

import sptransform.ops  # noqa: F401 - registers the ops this table names
from sptransform.rules.factors import dim_of, dims_and_sizes, dims_of
from sptransform.rules.rule import Dims, OpCall, OpRule, RuleFn, Shape
from sptransform.rules.table import Local, OpEntry
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


_RESHAPE = OpEntry(reshape, _reshape_local)
_SWAP = OpEntry(_permuted(_swap))

TABLE: list[tuple[Any, OpEntry | RuleFn]] = [
    (aten._reshape_alias.default, _RESHAPE),
    (aten._unsafe_view.default, _RESHAPE),
    (aten.expand.default, OpEntry(expand, _expand_local)),
    (aten.flatten.using_ints, _RESHAPE),
    (aten.mT.default, _SWAP),
    (aten.movedim.int, OpEntry(_permuted(_moved_dim))),
    (aten.numpy_T.default, _SWAP),
    (aten.permute.default, OpEntry(_permuted(lambda call, ndim: [d % ndim for d in call.argument("dims")]))),
    (aten.repeat.default, OpEntry(repeat, _repeat_local)),
    (aten.repeat_interleave.self_int, OpEntry(repeat_interleave, _repeat_interleave_local)),
    (aten.reshape.default, _RESHAPE),
    (aten.squeeze.default, _RESHAPE),
    (aten.squeeze.dim, _RESHAPE),
    (aten.squeeze.dims, _RESHAPE),
    (aten.t.default, _SWAP),
    (aten.transpose.int, _SWAP),
    (aten.unflatten.int, _RESHAPE),
    (aten.unsqueeze.default, _RESHAPE),
    (aten.view.default, _RESHAPE),
    (aten.view_as.default, OpEntry(view_as, _reshape_local)),
]
