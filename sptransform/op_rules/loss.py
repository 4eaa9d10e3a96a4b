"""Losses with ``reduction`` "none" or "sum"; ``passes/normalize/split_means.py`` writes a mean as sum / count first.

And the cross-entropy of a linear's logits, token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

import sptransform.ops  # noqa: F401 - registers the ops this table names
from sptransform.ops.logit_sums import sum_dtype
from sptransform.rules.einsum import rule
from sptransform.rules.rule import OpCall, OpRule, RuleFn
from sptransform.rules.table import Local, OpEntry, Sent
from sptransform.sharding.partition import Partition

aten, sp = torch.ops.aten, torch.ops.sptransform


NONE, MEAN, SUM = 0, 1, 2
LINEAR_CROSS_ENTROPY = sp.linear_cross_entropy.default
_IGNORED = -100  # not a class index on any rank


def cross_entropy(call: OpCall) -> OpRule:
    """``input [n, c, d...]`` or ``[c]``; the target has class indices ``[n, d...]`` or class probabilities."""
    shape, target_shape = call.operand_shapes[:2]
    num_tail = max(len(shape) - 2, 0)
    tail = "".join(f" d{i}" for i in range(num_tail))
    logits = f"n c{tail}" if len(shape) > 1 else "c"
    labels = logits if target_shape == shape else f"n{tail}" if len(shape) > 1 else ""
    points = (f"n{tail}" if len(shape) > 1 else "").split()
    weight = ", c" if call.operand("weight") is not None else ""
    reduction = call.argument("reduction")
    out = "" if reduction else " ".join(points)
    if reduction == SUM:
        kinds = {"reduce": " ".join(points), "replicated": "c"}
    elif reduction == MEAN:
        kinds = {"replicated": " ".join([*points, "c"])}
    else:
        kinds = {"replicated": "c"}
    return rule(f"{logits}, {labels}{weight} -> {out}", **kinds)(call)


def nll(call: OpCall) -> OpRule:
    """:func:`cross_entropy` of log-probabilities. The entry of the label's class is looked up, so ``c`` may be cut."""
    found = cross_entropy(call)
    if call.argument("reduction") == MEAN or call.operand_shapes[0] == call.operand_shapes[1]:
        return found
    return replace(found, replicated=frozenset(), reduce=found.reduce | {"c"})


def _nll_local(call: OpCall, local: Local) -> Any:
    """A rank that does not own the label's class ignores the label."""
    if local.decision.factor != "c":
        return local.run(call)
    emit, labels = local.emit, local.operands[1]
    is_valid = emit(aten.ne.Scalar, (labels, call.argument("ignore_index")), {})
    index = emit(aten.where.ScalarOther, (is_valid, labels, 0), {})
    index = emit(sp.local_index.default, (index, str(local.decision.partition), local.group), {})
    is_own = emit(aten.logical_and.default, (is_valid, emit(aten.ge.Scalar, (index, 0), {})), {})
    target = emit(aten.where.ScalarOther, (is_own, index, _IGNORED), {})
    logs, *weight = (x for i, x in enumerate(local.operands) if i != 1)
    if not local.decision.partition.local_size(local.rank):  # the op needs at least one class; no label selects it
        num_tail = max(len(call.operand_shapes[0]) - 2, 0)
        logs = emit(aten.constant_pad_nd.default, (logs, [0, 0] * num_tail + [0, 1]), {})
        weight = [emit(aten.constant_pad_nd.default, (x, [0, 1]), {}) for x in weight]
    return emit(aten.nll_loss_nd.default, (logs, target, *(weight or [None]), call.argument("reduction"), _IGNORED), {})


def elementwise_loss(call: OpCall) -> OpRule:
    """A loss that is pointwise before its reduction."""
    reduction = call.argument("reduction")
    ndim = max(len(shape) for shape in call.operand_shapes)
    points = [f"i{d}" for d in range(ndim)]
    operands = ", ".join(" ".join(points[ndim - len(shape) :]) for shape in call.operand_shapes)
    out = "" if reduction else " ".join(points)
    kinds = {SUM: {"reduce": " ".join(points)}, MEAN: {"replicated": " ".join(points)}, NONE: {}}[reduction]
    return rule(f"{operands} -> {out}", **kinds)(call)


def linear_cross_entropy(call: OpCall) -> OpRule:
    """The classes are whole, or are cut and the op reduces over the ranks itself: every rank then has the results."""
    num_vectors = len(call.operand_shapes) - 3  # bias and columns
    operands = ", ".join(["... k", "v k", "...", *["v"] * num_vectors])
    found = rule(f"{operands} -> ..., ...", replicated="k v", heavy=True)(call)
    return found if call.argument("classes") else replace(found, self_reduced=frozenset({"v"}))


def _linear_cross_entropy_local(call: OpCall, local: Local) -> Any:
    if local.decision.factor != "v":
        return local.run(call)
    return local.run(call, classes=str(local.decision.partition), group_name=local.group)


def _linear_cross_entropy_sends(call: OpCall, operands: Sequence[Tensor], rank: int) -> tuple[Sent, Sent]:
    """Forward a maximum, and three sums as one; nothing backward."""
    num_ranks = Partition.parse(call.argument("classes")).num_ranks
    has_bias = call.operand("bias") is not None
    dtype = sum_dtype(operands[0], operands[3 + has_bias :], call.argument("program"))
    num_bytes = 4 * prod(call.result_shapes[0]) * dtype.itemsize
    return Sent("all_reduce", 2, 2 * num_bytes * (num_ranks - 1) // num_ranks), Sent("all_reduce", 0, 0)


TABLE: list[tuple[Any, OpEntry | RuleFn]] = [
    (aten.binary_cross_entropy_with_logits.default, elementwise_loss),
    (aten.cross_entropy_loss.default, cross_entropy),
    (aten.huber_loss.default, elementwise_loss),
    (aten.kl_div.default, elementwise_loss),
    (aten.l1_loss.default, elementwise_loss),
    (aten.mse_loss.default, elementwise_loss),
    (aten.nll_loss_nd.default, OpEntry(nll, _nll_local)),
    (aten.smooth_l1_loss.default, elementwise_loss),
    (
        LINEAR_CROSS_ENTROPY,
        OpEntry(linear_cross_entropy, _linear_cross_entropy_local, _linear_cross_entropy_sends),
    ),
]
