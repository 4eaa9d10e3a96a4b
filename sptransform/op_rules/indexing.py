"""Embedding, gather, advanced indexing, searchsorted: index dimensions pass to the result, indexed ones must be whole.

The exceptions are an embedding table that is cut along its rows, and a gather of one entry of each row, such as the
logit of a label: a lookup is a contraction with a one-hot vector, so each rank computes one term of a pending sum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

import sptransform.ops  # noqa: F401 - registers the ops this table names
from sptransform.rules.einsum import rule
from sptransform.rules.factors import dim_of, dims_and_sizes
from sptransform.rules.rule import Dims, OpCall, Operand, OpRule, RuleFn, Shape
from sptransform.rules.table import Local, OpEntry
from sptransform.sharding.sizes import Size, broadcast

aten, sp = torch.ops.aten, torch.ops.sptransform

# dtypes of indices that say which entries are read, not where they are
_MASKS = (torch.bool, torch.uint8)


def embedding(call: OpCall) -> OpRule | None:
    """``weight[indices]``. None with ``scale_grad_by_freq``: no rank knows how often an index occurs globally."""
    if call.argument("scale_grad_by_freq"):
        return None
    found = rule("v h, ... -> ... h", reduce="v", linear=((0,),), heavy=True)(call)
    return replace(found, looked_up=frozenset({".1"} & set(found.sizes)))


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
    """Along ``dim`` one entry is read, or the operand is whole. Elsewhere dimensions of equal size are one factor."""
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
    read = {f"o{dim}"} & set(sizes) if shape and index_shape[dim] == 1 else set()
    reduce, whole = frozenset(read), frozenset(replicated - read)
    return OpRule((tuple(operand), index), (index,), sizes, reduce=reduce, replicated=whole, linear=(frozenset({0}),))


def _gather_local(call: OpCall, local: Local) -> Any:
    """A rank that does not own the entry returns zero."""
    if local.decision.factor not in local.rule.reduce:
        return local.run(call)
    x, indices = local.operands
    emit, partition = local.emit, local.decision.partition.tiled(local.decision.outer)
    dim = call.argument("dim") % len(call.operand_shapes[0])
    if not partition.local_size(local.rank):  # a lookup needs at least one entry; it is masked below
        x = emit(aten.constant_pad_nd.default, (x, [0, 0] * (len(call.operand_shapes[0]) - 1 - dim) + [0, 1]), {})
    index = emit(sp.local_index.default, (indices, str(partition), local.group), {})
    found = emit(aten.gather.default, (x, dim, emit(aten.clamp.default, (index, 0), {})), {})
    return emit(aten.where.ScalarOther, (emit(aten.ge.Scalar, (index, 0), {}), found, 0), {})


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


@dataclass(frozen=True)
class Indexed:
    """What an advanced index reads or writes, as factors: of the operand, of every index, and of the entries."""

    operand: Dims
    indices: dict[int, Dims]  # by operand
    entries: Dims
    shape: Shape  # of the entries
    sizes: dict[str, Size]
    spread: tuple[str, ...]  # the factors of all indices together
    indexed: frozenset[str]  # factors of the dimensions that are indexed


def indexed(call: OpCall) -> Indexed | None:
    """``x[i, j]`` by integers; None for boolean indices, which read as many entries as are true."""
    shape = call.operand_shapes[0]
    positions = {d: leaf.index for d, leaf in enumerate(call.argument("indices")) if isinstance(leaf, Operand)}
    if not positions or any(call.operand_dtypes[i] in _MASKS for i in positions.values()):
        return None
    dims = sorted(positions)
    spread_shape = broadcast(*(call.operand_shapes[i] for i in positions.values()))
    if spread_shape is None:
        return None
    kept = [d for d in range(len(shape)) if d not in positions]
    adjacent = dims == list(range(dims[0], dims[-1] + 1))
    at = dims[0] if adjacent else 0
    operand, sizes = dims_and_sizes(shape)
    num = len(spread_shape)
    spread, spread_sizes = dims_and_sizes(spread_shape, [f"b{num - i}" for i in range(num)])
    indices = {}
    for position in positions.values():
        own = call.operand_shapes[position]
        tail = spread[num - len(own) :]
        indices[position] = tuple(f if size != 1 else () for f, size in zip(tail, own, strict=True))
    passed, passed_shape = [operand[d] for d in kept], [shape[d] for d in kept]
    return Indexed(
        operand,
        indices,
        (*passed[:at], *spread, *passed[at:]),
        (*passed_shape[:at], *spread_shape, *passed_shape[at:]),
        sizes | spread_sizes,
        tuple(f for factors in spread for f in factors),
        frozenset(f for d in dims for f in operand[d]),
    )


def index(call: OpCall) -> OpRule | None:
    """Advanced indexing by integers: ``x[i, j]``. None for boolean indices, whose result has no fixed size."""
    found = indexed(call)
    if found is None:
        return None
    operands = (found.operand, *(found.indices[i] for i in sorted(found.indices)))
    return OpRule(operands, (found.entries,), found.sizes, replicated=found.indexed)


def searchsorted(call: OpCall) -> OpRule | None:
    """Where each value belongs in one sorted sequence, which must be whole. None for a sequence for each row."""
    if len(call.operand_shapes) != 2 or len(call.operand_shapes[0]) != 1:
        return None
    return rule("n, ... -> ...", replicated="n")(call)


TABLE: list[tuple[Any, OpEntry | RuleFn]] = [
    (aten.bucketize.Tensor, rule("..., n -> ...", replicated="n")),
    (aten.embedding.default, OpEntry(embedding, _embedding_local)),
    (aten.gather.default, OpEntry(gather, _gather_local)),
    (aten.index.Tensor, index),
    (aten.index_select.default, index_select),
    (aten.searchsorted.Tensor, searchsorted),
]
