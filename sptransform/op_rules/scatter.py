"""Entries put, added or counted where an index says: scatters, index_add, index_put, one_hot, histc.

What an op adds it may add in parts. Each rank's result is then a term of a sum, and the first rank has what was there
before.
"""

from __future__ import annotations

from typing import Any

import torch

import sptransform.ops  # noqa: F401 - registers the ops this table names
from sptransform.op_rules.indexing import indexed
from sptransform.op_rules.pieces import num_owned_below, piece_of, start_of_slice
from sptransform.rules.einsum import rule
from sptransform.rules.factors import dim_of, dims_and_sizes
from sptransform.rules.rule import OpCall, OpRule, RuleFn
from sptransform.rules.table import Local, OpEntry
from sptransform.sharding.sizes import Size, broadcast

aten, sp = torch.ops.aten, torch.ops.sptransform

_TERMS = (frozenset({0, 2}),)
_JOINTLY = (frozenset({0, 1}),)


def _scatter(adds: bool) -> RuleFn:
    """``x[.., index[.., j, ..], ..] = src[.., j, ..]``; x is whole along ``dim``, elsewhere equal sizes are one."""

    def apply(call: OpCall) -> OpRule:
        shapes = call.operand_shapes
        dim = call.argument("dim") % max(len(shapes[0]), 1)
        sizes: dict[str, Size] = {}
        whole: set[str] = set()
        is_read_in_full = adds and len({shape[dim] if shape else 1 for shape in shapes[1:]}) == 1

        def factors(which: int, d: int) -> tuple[str, ...]:
            size = shapes[which][d]
            name = f"{which}.{d}"
            if d == dim and which and is_read_in_full:
                name = "n"
            elif d != dim and all(shape[d] == size for shape in shapes):
                name = f"i{d}"
            else:
                whole.add(name)
            sizes[name] = size
            return dim_of(name, size)

        x, *others = (tuple(factors(which, d) for d in range(len(shape))) for which, shape in enumerate(shapes))
        reduce = frozenset({"n"}) if sizes.get("n", 1) != 1 else frozenset()
        linear = _TERMS if adds else ()
        return OpRule((x, *others), (x,), sizes, reduce, frozenset(whole), linear=linear)

    return apply


def index_add(call: OpCall) -> OpRule | None:
    """None for an index without dimensions."""
    shape, index_shape, source = call.operand_shapes
    if len(index_shape) != 1 or len(source) != len(shape):
        return None
    dim = call.argument("dim") % len(shape)
    x, sizes = dims_and_sizes(shape)
    added = dim_of("n", index_shape[0])
    written = (*x[:dim], added, *x[dim + 1 :])
    sizes["n"] = index_shape[0]
    return OpRule((x, (added,), written), (x,), sizes, frozenset(added), frozenset(x[dim]), linear=_TERMS)


def index_put(call: OpCall) -> OpRule | None:
    """None for boolean indices."""
    found = indexed(call)
    if found is None:
        return None
    values = call.operand_shapes[-1]
    missing = len(found.shape) - len(values)
    if missing < 0 or broadcast(values, found.shape) != found.shape:
        return None
    tail = zip(values, found.entries[missing:], strict=True)
    written = tuple(factors if size != 1 else () for size, factors in tail)
    spread = frozenset(found.spread)
    adds = call.argument("accumulate")
    # a value that is added at several indices is read on each rank that has one of them
    operands = (found.operand, *(found.indices[i] for i in sorted(found.indices)), written)
    return OpRule(
        operands,
        (found.operand,),
        found.sizes,
        reduce=spread if adds else frozenset(),
        replicated=found.indexed if adds else found.indexed | spread,
        linear=(frozenset({0, len(operands) - 1}),) if adds else (),
    )


def add_local(call: OpCall, local: Local) -> Any:
    """Of a sum that each rank has a term of, the first rank has what was there before."""
    if local.decision.factor not in local.rule.reduce:
        return local.run(call)
    before = local.operands[0]
    for masks_value in (True, False):  # and its gradient
        before = local.emit(sp.first_rank.default, (before, local.group, masks_value), {})
    return local.run(call, self=before)


def slice_scatter(call: OpCall) -> OpRule | None:
    """A slice of step 1 is written where its indices are owned; any other is written whole."""
    shape, source = call.operand_shapes
    dim = call.argument("dim") % len(shape)
    x, sizes = dims_and_sizes(shape)
    start, step = start_of_slice(call, dim), call.argument("step")
    if source == shape:
        return OpRule((x, x), (x,), sizes, linear=_JOINTLY)
    if step == 1 and x[dim] and source[dim] != 1:
        resize = {("operand", 1, f"i{dim}"): piece_of(start, start + source[dim])}
        return OpRule((x, x), (x,), sizes, resize=resize, linear=_JOINTLY)
    sizes["written"] = source[dim]
    written = (*x[:dim], dim_of("written", source[dim]), *x[dim + 1 :])
    return OpRule((x, written), (x,), sizes, replicated=frozenset({"written", *x[dim]}), linear=_JOINTLY)


def _slice_scatter_local(call: OpCall, local: Local) -> Any:
    resize = next(iter(local.rule.resize.items()), None)
    if resize is None or local.decision.factor != resize[0][2]:
        return local.run(call)
    start = resize[1].start
    stop = start + call.operand_shapes[1][call.argument("dim") % len(call.operand_shapes[0])]
    return local.run(call, start=num_owned_below(start, local), end=num_owned_below(stop, local))


def select_scatter(call: OpCall) -> OpRule:
    """The dimension of which one entry is written must be whole."""
    shape = call.operand_shapes[0]
    dim = call.argument("dim") % len(shape)
    x, sizes = dims_and_sizes(shape)
    return OpRule((x, (*x[:dim], *x[dim + 1 :])), (x,), sizes, replicated=frozenset(x[dim]), linear=_JOINTLY)


def one_hot(call: OpCall) -> OpRule | None:
    """None where the number of classes is left to the data."""
    return None if call.argument("num_classes") < 0 else rule("... -> ... c", replicated="c")(call)


def histc(call: OpCall) -> OpRule | None:
    """A histogram of parts is a term of the whole one. None where the data says where bins begin and end."""
    if call.argument("min") == call.argument("max"):
        return None
    return rule("... -> h", reduce="...", replicated="h")(call)


TABLE: list[tuple[Any, OpEntry | RuleFn]] = [
    (aten.histc.default, histc),
    (aten.index_add.default, OpEntry(index_add, add_local)),
    (aten.index_put.default, OpEntry(index_put, add_local)),
    (aten.one_hot.default, one_hot),
    (aten.scatter.src, _scatter(adds=False)),
    (aten.scatter.value, _scatter(adds=False)),
    (aten.scatter_add.default, OpEntry(_scatter(adds=True), add_local)),
    (aten.select_scatter.default, select_scatter),
    (aten.slice_scatter.default, OpEntry(slice_scatter, _slice_scatter_local)),
]
