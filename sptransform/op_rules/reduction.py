"""Reductions, norms, softmax, sorts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

import sptransform.ops  # noqa: F401 - registers the ops this table names
from sptransform.op_rules.windows import is_nothing, nothing
from sptransform.rules.factors import dim_of, dims_and_sizes
from sptransform.rules.rule import OpCall, OpRule, RuleFn
from sptransform.rules.table import Local, OpEntry, Sent

aten, sp = torch.ops.aten, torch.ops.sptransform


_LINEAR = (frozenset({0}),)


def _reduced_dims(call: OpCall) -> set[int]:
    ndim = len(call.operand_shapes[0])
    try:
        dim = call.argument("dim")
    except ValueError:
        dim = None
    if dim is None or dim == []:
        return set(range(ndim))
    return {d % ndim for d in ([dim] if isinstance(dim, int) else dim)} if ndim else set()


def reduction(summed: bool) -> RuleFn:
    """Reduced dimensions leave the result; they may be sharded where the reduction is a sum."""

    def apply(call: OpCall) -> OpRule:
        shape = call.operand_shapes[0]
        operand, sizes = dims_and_sizes(shape)
        reduced = _reduced_dims(call)
        keeps = len(call.result_shapes[0]) == len(shape)
        result = tuple(() if d in reduced else f for d, f in enumerate(operand) if keeps or d not in reduced)
        gone = frozenset(f"i{d}" for d in reduced if shape[d] != 1)
        # with ``dtype`` each pending term is converted, and so rounded, before the sum: not linear
        linear = _LINEAR if summed and call.argument("dtype") is None else ()
        kinds = {"reduce": gone, "linear": linear} if summed else {"replicated": gone}
        return OpRule((operand,), (result,) * len(call.result_shapes), sizes, **kinds)

    return apply


def mean_local(call: OpCall, local: Local) -> Any:
    """A mean divides by the global count, on every rank."""
    if local.decision.factor not in local.rule.reduce:
        return local.run(call)
    shape = call.operand_shapes[0]
    count = 1
    for dim in _reduced_dims(call):
        count *= shape[dim]
    (x,) = local.operands
    dims = sorted(_reduced_dims(call))
    keepdim = len(call.result_shapes[0]) == len(shape)
    dtype = local.result_dtypes[0]
    if dtype.itemsize > 2:
        total = local.emit(aten.sum.dim_IntList, (x, dims, keepdim), {"dtype": call.argument("dtype")})
        return local.emit(aten.div.Scalar, (total, count), {})
    # a 16-bit dtype cannot hold the sum; torch accumulates a mean in float32 on one device too
    total = local.emit(aten.sum.dim_IntList, (x, dims, keepdim), {"dtype": torch.float32})
    return local.emit(aten.to.dtype, (local.emit(aten.div.Scalar, (total, count), {}), dtype), {})


def moments(call: OpCall) -> OpRule:
    """Variances: dimensions they are taken over are whole, or one is cut and the op adds up over the ranks itself."""
    found = _WHOLE(call)
    return replace(found, self_reduced=found.replicated)


def _moments_local(call: OpCall, local: Local) -> Any:
    if local.decision.factor not in local.rule.self_reduced:
        return local.run(call)
    (x,) = local.operands
    shape, dims = call.operand_shapes[0], sorted(_reduced_dims(call))
    correction = call.argument("correction")
    return local.emit(
        _JOINED_MOMENTS[call.target],
        (
            x,
            dims,
            len(call.result_shapes[0]) == len(shape),
            prod(shape[dim] for dim in dims),
            1 if correction is None else correction,
            local.decision.partition.num_ranks,
            local.group,
        ),
        {},
    )


def _moments_sends(call: OpCall, operands: Sequence[Tensor], rank: int) -> tuple[Sent, Sent]:
    """Two sums forward, nothing backward."""
    (x,), num_ranks = operands, call.argument("num_ranks")
    entries = prod(size for d, size in enumerate(x.shape) if d not in call.argument("dims"))
    num_bytes = 2 * entries * max(x.dtype.itemsize, 4) * (num_ranks - 1) // num_ranks
    return Sent("all_reduce", 2, 2 * num_bytes), Sent("all_reduce", 0, 0)


def _joined_moments(call: OpCall) -> OpRule:
    """Over ``dims``, which have to be whole over the ranks of this mesh dim."""
    shape, dims = call.operand_shapes[0], call.argument("dims")
    operand, sizes = dims_and_sizes(shape)
    kept = [() if d in dims else names for d, names in enumerate(operand)]
    result = tuple(names for d, names in enumerate(kept) if call.argument("keepdim") or d not in dims)
    gone = frozenset(f"i{d}" for d in dims) & set(sizes)
    return OpRule((operand,), (result,) * len(call.result_shapes), sizes, replicated=gone)


def along_dim(call: OpCall) -> OpRule:
    """Softmax, sorts: the dimension they run along must be whole; its extent may be another after it."""
    shape = call.operand_shapes[0]
    dims, sizes = dims_and_sizes(shape)
    dim = call.argument("dim") % max(len(shape), 1)
    replicated = {f"i{dim}"} & set(sizes)
    results = []
    for result_shape in call.result_shapes:
        own = list(dims)
        if shape and result_shape[dim] != shape[dim]:  # topk, glu
            own[dim] = dim_of("k", result_shape[dim])
            sizes["k"] = result_shape[dim]
            replicated.add("k")
        results.append(tuple(own))
    return OpRule((dims,), tuple(results), sizes, replicated=frozenset(replicated))


def along_dims(call: OpCall) -> OpRule | None:
    """Flips and rolls: several dimensions must be whole. None for a roll of the flattened tensor."""
    shape, along = call.operand_shapes[0], call.argument("dims")
    if not along and call.target is aten.roll.default:
        return None
    dims, sizes = dims_and_sizes(shape)
    replicated = {f"i{dim % len(shape)}" for dim in along} & set(sizes)
    return OpRule((dims,), (dims,), sizes, replicated=frozenset(replicated), linear=(frozenset({0}),))


def softmax(call: OpCall) -> OpRule:
    """The dimension it runs along is whole, or is sharded and the op reduces over the ranks itself."""
    found = along_dim(call)
    return replace(found, self_reduced=found.replicated)


def _softmax_local(call: OpCall, local: Local) -> Any:
    if local.decision.factor not in local.rule.self_reduced:
        return local.run(call)
    (x,) = local.operands
    num_ranks = local.decision.partition.num_ranks
    # autocast sets the dtype of torch's op, but does not know this one
    dtype = local.result_dtypes[0]
    return local.emit(_JOINED[call.target], (x, call.argument("dim"), dtype, num_ranks, local.group), {})


def logsumexp(call: OpCall) -> OpRule:
    """As :func:`softmax`, along one dimension; several must be whole."""
    found = _WHOLE(call)
    return replace(found, self_reduced=found.replicated) if len(_reduced_dims(call)) == 1 else found


def _logsumexp_local(call: OpCall, local: Local) -> Any:
    if local.decision.factor not in local.rule.self_reduced:
        return local.run(call)
    (x,), (dim,) = local.operands, _reduced_dims(call)
    keepdim = len(call.result_shapes[0]) == len(call.operand_shapes[0])
    num_ranks = local.decision.partition.num_ranks
    return local.emit(sp.logsumexp.default, (x, dim, keepdim, local.result_dtypes[0], num_ranks, local.group), {})


def _logsumexp_sends(call: OpCall, operands: Sequence[Tensor], rank: int) -> tuple[Sent, Sent]:
    """Maximum and sum forward, nothing backward."""
    forward, _ = _softmax_sends(call, operands, rank)
    return forward, Sent("all_reduce", 0, 0)


def _softmax_sends(call: OpCall, operands: Sequence[Tensor], rank: int) -> tuple[Sent, Sent]:
    """Maximum and sum forward, one sum backward."""
    shape, num_ranks = operands[0].shape, call.argument("num_ranks")
    entries = prod(size for d, size in enumerate(shape) if d != call.argument("dim") % len(shape))
    num_bytes = 2 * entries * max(call.argument("dtype").itemsize, 4) * (num_ranks - 1) // num_ranks
    return Sent("all_reduce", 2, 2 * num_bytes), Sent("all_reduce", 1, num_bytes)


def norm(call: OpCall) -> OpRule:
    """Layer norm and RMS norm: the trailing normalised dimensions must be whole, weight and bias have only those."""
    shape = call.operand_shapes[0]
    num = len(call.argument("normalized_shape"))
    dims, sizes = dims_and_sizes(shape)
    tail = dims[len(dims) - num :]
    operands = (dims, *((tail,) * (len(call.operand_shapes) - 1)))
    replicated = frozenset(factors[0] for factors in tail if factors)
    return OpRule(operands, (dims,), sizes, replicated=replicated)


def batch_norm(call: OpCall) -> OpRule | None:
    """With given statistics each entry is for itself. In training capture has opened it."""
    if call.argument("training"):
        return None
    dims, sizes = dims_and_sizes(call.operand_shapes[0])
    return OpRule((dims, *((dims[1:2],) * (len(call.operand_shapes) - 1))), (dims,), sizes)


def _unless_empty(call: OpCall, local: Local) -> Any:
    """For ops whose kernels fail on no entries."""
    return nothing(local) if is_nothing(local) else local.run(call)


def weight_norm(call: OpCall) -> OpRule:
    """Each entry of ``dim`` has a norm of its own, over all other dimensions."""
    shape, of_norms = call.operand_shapes
    dims, sizes = dims_and_sizes(shape)
    norms = tuple(() if size == 1 else names for names, size in zip(dims, of_norms, strict=True))
    kept = set(dims[call.argument("dim") % len(shape)])
    return OpRule((dims, norms), (dims,), sizes, replicated=frozenset(set(sizes) - kept))


def triangle(call: OpCall) -> OpRule:
    """``tril`` and ``triu`` read positions in the last two dimensions."""
    shape = call.operand_shapes[0]
    dims, sizes = dims_and_sizes(shape)
    replicated = frozenset({f"i{len(shape) - 2}", f"i{len(shape) - 1}"} & set(sizes))
    return OpRule((dims,), (dims,), sizes, replicated=replicated)


_JOINED = {
    aten._log_softmax.default: sp.log_softmax.default,
    aten._softmax.default: sp.softmax.default,
    aten.log_softmax.int: sp.log_softmax.default,
    aten.softmax.int: sp.softmax.default,
}
_JOINED_MOMENTS = {
    aten.std.correction: sp.joined_std.default,
    aten.var.correction: sp.joined_var.default,
    aten.var_mean.correction: sp.joined_var_mean.default,
}
_SOFTMAX = OpEntry(softmax, _softmax_local)
_JOINED_SOFTMAX = OpEntry(along_dim, sends=_softmax_sends)
_MOMENTS = OpEntry(moments, _moments_local)
_OF_JOINED = OpEntry(_joined_moments, sends=_moments_sends)
_SUM = reduction(summed=True)
_WHOLE = reduction(summed=False)
_MEAN = OpEntry(_SUM, mean_local)

TABLE: list[tuple[Any, OpEntry | RuleFn]] = [
    (aten._log_softmax.default, _SOFTMAX),
    (aten._softmax.default, _SOFTMAX),
    (aten._weight_norm.default, OpEntry(weight_norm, _unless_empty)),
    (aten.all.default, _WHOLE),
    (aten.all.dim, _WHOLE),
    (aten.amax.default, _WHOLE),
    (aten.amin.default, _WHOLE),
    (aten.any.default, _WHOLE),
    (aten.any.dim, _WHOLE),
    (aten.argmax.default, _WHOLE),
    (aten.argmin.default, _WHOLE),
    (aten.argsort.default, along_dim),
    (aten.argsort.stable, along_dim),
    (aten.batch_norm.default, OpEntry(batch_norm, _unless_empty)),
    (aten.flip.default, along_dims),
    (aten.glu.default, along_dim),
    (aten.layer_norm.default, norm),
    (aten.log_softmax.int, _SOFTMAX),
    (aten.logsumexp.default, OpEntry(logsumexp, _logsumexp_local)),
    (aten.max.default, _WHOLE),
    (aten.max.dim, _WHOLE),
    (aten.mean.default, _MEAN),
    (aten.mean.dim, _MEAN),
    (aten.min.default, _WHOLE),
    (aten.min.dim, _WHOLE),
    (aten.prod.default, _WHOLE),
    (aten.rms_norm.default, norm),
    (aten.roll.default, along_dims),
    (aten.softmax.int, _SOFTMAX),
    (aten.sort.default, along_dim),
    (aten.sort.stable, along_dim),
    (aten.std.correction, _MOMENTS),
    (aten.sum.default, _SUM),
    (aten.sum.dim_IntList, _SUM),
    (aten.topk.default, along_dim),
    (aten.tril.default, triangle),
    (aten.triu.default, triangle),
    (aten.var.correction, _MOMENTS),
    (aten.var_mean.correction, _MOMENTS),
    (sp.joined_std.default, _OF_JOINED),
    (sp.joined_var.default, _OF_JOINED),
    (sp.joined_var_mean.default, _OF_JOINED),
    (sp.log_softmax.default, _JOINED_SOFTMAX),
    (sp.logsumexp.default, OpEntry(_WHOLE, sends=_logsumexp_sends)),
    (sp.softmax.default, _JOINED_SOFTMAX),
]
