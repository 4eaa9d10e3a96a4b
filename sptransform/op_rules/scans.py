"""Cumulative sums and recurrences: along a dimension that is cut, ranks send their totals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

import sptransform.ops  # noqa: F401 - registers the ops this table names
from sptransform.op_rules.reduction import along_dim
from sptransform.rules.factors import dims_and_sizes
from sptransform.rules.rule import OpCall, OpRule, RuleFn
from sptransform.rules.table import Local, OpEntry, Sent

aten, sp = torch.ops.aten, torch.ops.sptransform


def running(call: OpCall) -> OpRule:
    """The dimension it runs along is whole, or each rank has a block of it and they are joined."""
    found = along_dim(call)
    return replace(found, self_reduced=found.replicated, ordered=found.replicated)


def joined(call: OpCall) -> OpRule:
    """Joined over the ranks of the mesh dim before; over those of this one the dimension it runs along is whole."""
    found = along_dim(call)
    return replace(found, ordered=found.replicated)


def _running_local(call: OpCall, local: Local) -> Any:
    decision = local.decision
    if decision.factor not in local.rule.self_reduced:
        return local.run(call)
    (x,) = local.operands
    num_ranks = decision.partition.num_ranks
    args = (x, call.argument("dim"), local.result_dtypes[0], decision.outer, num_ranks, local.group)
    return local.emit(_JOINED[call.target], args, {})


def scan(call: OpCall) -> OpRule:
    """As :func:`running`; the decays have the dimension too, and what else they share with the states."""
    shape = call.operand_shapes[0]
    dims, sizes = dims_and_sizes(shape)
    pairs = zip(dims, call.operand_shapes[1], strict=True)
    decays = tuple(() if size == 1 else names for names, size in pairs)
    along = frozenset(dims[call.argument("dim") % len(shape)])
    return OpRule(
        (dims, decays),
        (dims,),
        sizes,
        replicated=along,
        self_reduced=along if call.target is sp.scan.default else frozenset(),
        ordered=along,
        linear=(frozenset({0}),),
    )


def _scan_local(call: OpCall, local: Local) -> Any:
    if local.decision.factor not in local.rule.self_reduced:
        return local.run(call)
    decision = local.decision
    args = (*local.operands, call.argument("dim"), decision.outer, decision.partition.num_ranks, local.group)
    return local.emit(sp.joined_scan.default, args, {})


def _sends(call: OpCall, operands: Sequence[Tensor], rank: int) -> tuple[Sent, Sent]:
    """The totals of one rank to all others, and the gradients of theirs back."""
    dim = call.argument("dim") % operands[0].ndim
    dtype = operands[0].dtype if call.target is sp.joined_scan.default else call.argument("dtype")
    entries = sum(prod(size for d, size in enumerate(x.shape) if d != dim) for x in operands)
    num_bytes = call.argument("outer") * entries * dtype.itemsize * (call.argument("num_ranks") - 1)
    return Sent("all_gather", 1, num_bytes), Sent("reduce_scatter", 1, num_bytes)


_JOINED = {
    aten.cumprod.default: sp.joined_cumprod.default,
    aten.cumsum.default: sp.joined_cumsum.default,
}
_RUNNING = OpEntry(running, _running_local)
_JOINED_RUNNING = OpEntry(joined, sends=_sends)

TABLE: list[tuple[Any, OpEntry | RuleFn]] = [
    (aten.cumprod.default, _RUNNING),
    (aten.cumsum.default, _RUNNING),
    (sp.joined_cumprod.default, _JOINED_RUNNING),
    (sp.joined_cumsum.default, _JOINED_RUNNING),
    (sp.joined_scan.default, OpEntry(scan, sends=_sends)),
    (sp.scan.default, OpEntry(scan, _scan_local)),
]
