"""Embedding, gather and advanced indexing: index dimensions pass to the result, indexed ones must be whole.

The exception is an embedding table that is cut along its rows: a lookup is a contraction with a one-hot vector, so
each rank computes one term of a pending sum.
"""

from __future__ import annotations

from typing import Any

import torch

import sptransform.ops  # noqa: F401 - registers the ops this table names
from sptransform.rules.einsum import rule
from sptransform.rules.factors import dim_of, dims_and_sizes
from sptransform.rules.rule import OpCall, Operand, OpRule, RuleFn
from sptransform.rules.table import Local, OpEntry
from sptransform.sharding.sizes import broadcast

aten, sp = torch.ops.aten, torch.ops.sptransform


def embedding(call: OpCall) -> OpRule | None:
    """``weight[indices]``. None with ``scale_grad_by_freq``: no rank knows how often an index occurs globally."""
    if call.argument("scale_grad_by_freq"):
        return None
    return rule("v h, ... -> ... h", reduce="v", linear=((0,),), heavy=True)(call)


def _embedding_local(call: OpCall, local: Local) -> Any:
    """A rank that does not own the row returns zeros."""
    if local.decision.factor != "v":
        return local.run(call)
    weight, indices = local.operands
    emit, partition = local.emit, str(local.decision.partition)
    if not local.decision.partition.local_size(local.rank):  # a lookup needs at least one row; it is masked below
        weight = emit(aten.constant_pad_nd.default, (weight, [0, 0, 0, 1]), {})
    index = emit(sp.local_index.default, (indices, partition, local.group), {})
    is_own = emit(aten.unsqueeze.default, (emit(aten.ge.Scalar, (index, 0), {}), -1), {})
    rows = emit(aten.embedding.default, (weight, emit(aten.clamp.default, (index, 0), {})), {})
    padding = call.argument("padding_idx")
    if padding >= 0:  # the padding row is read, but gets no gradient
        is_padding = emit(aten.unsqueeze.default, (emit(aten.eq.Scalar, (indices, padding), {}), -1), {})
        rows = emit(aten.where.self, (is_padding, emit(aten.detach.default, (rows,), {}), rows), {})
    return emit(aten.where.ScalarOther, (is_own, rows, 0.0), {})


def gather(call: OpCall) -> OpRule:
    """Along ``dim`` the operand must be whole. Elsewhere, dimensions of equal size are one factor."""
    shape, index_shape = call.operand_shapes
    dim = call.argument("dim") % max(len(shape), 1)
    index, sizes = dims_and_sizes(index_shape)
    operand, replicated = [], set()
    for d, size in enumerate(shape):
        if d != dim and size == index_shape[d]:
            operand.append(index[d])
            continue
        # off ``dim``, gather reads only the first index_shape[d] entries: neither side may be cut
        operand.append(dim_of(f"o{d}", size))
        sizes[f"o{d}"] = size
        replicated.add(f"o{d}")
        if d != dim:
            replicated.add(f"i{d}")
    return OpRule((tuple(operand), index), (index,), sizes, replicated=frozenset(replicated))


def index_select(call: OpCall) -> OpRule:
    shape = call.operand_shapes[0]
    dim = call.argument("dim") % len(shape)
    operand, sizes = dims_and_sizes(shape)
    num = call.operand_shapes[1][0] if call.operand_shapes[1] else 1
    taken = dim_of("n", num)
    sizes["n"] = num
    result = (*operand[:dim], taken, *operand[dim + 1 :])
    index = (taken,) if call.operand_shapes[1] else ()
    return OpRule((operand, index), (result,), sizes, replicated=frozenset({f"i{dim}"}), linear=(frozenset({0}),))


def index(call: OpCall) -> OpRule | None:
    """Advanced indexing by integers: ``x[i, j]``. None for boolean indices, whose result has no fixed size."""
    shape = call.operand_shapes[0]
    positions = {d: leaf.index for d, leaf in enumerate(call.argument("indices")) if isinstance(leaf, Operand)}
    if not positions:
        return None
    indexed = sorted(positions)
    index_shapes = [call.operand_shapes[i] for i in positions.values()]
    spread_shape = broadcast(*index_shapes)
    if spread_shape is None:
        return None
    kept = [d for d in range(len(shape)) if d not in positions]
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    at = indexed[0] if adjacent else 0
    new_shape = [shape[d] for d in kept]
    if (*new_shape[:at], *spread_shape, *new_shape[at:]) != call.result_shapes[0]:
        return None  # a boolean index
    operand, sizes = dims_and_sizes(shape)
    num = len(spread_shape)
    spread, spread_sizes = dims_and_sizes(spread_shape, [f"b{num - i}" for i in range(num)])
    operands = {0: operand}
    for position in positions.values():
        own = call.operand_shapes[position]
        tail = spread[num - len(own) :]
        operands[position] = tuple(f if size != 1 else () for f, size in zip(tail, own, strict=True))
    passed = [operand[d] for d in kept]
    result = (*passed[:at], *spread, *passed[at:])
    replicated = frozenset(f"i{d}" for d in indexed)
    return OpRule(tuple(operands[i] for i in sorted(operands)), (result,), sizes | spread_sizes, replicated=replicated)


TABLE: list[tuple[Any, OpEntry | RuleFn]] = [
    (aten.bucketize.Tensor, rule("..., n -> ...", replicated="n")),
    (aten.embedding.default, OpEntry(embedding, _embedding_local)),
    (aten.gather.default, gather),
    (aten.index.Tensor, index),
    (aten.index_select.default, index_select),
]
