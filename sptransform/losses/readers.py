"""What reads logits and needs no more of a token than its cross-entropy and its logsumexp."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from sptransform.graph import dataflow, notes
from sptransform.graph.calls import op_call
from sptransform.graph.edit import emit_like, succeed
from sptransform.losses.logits import Logits
from sptransform.op_rules.loss import MEAN, SUM
from sptransform.rules.rule import OpCall

aten = torch.ops.aten

_NO_INDEX = -(1 << 62)  # the ignored index of a lookup, which ignores none


@dataclass(frozen=True)
class Labels:
    """Class indices; two readers with equal ones share an op. ``is_index``: they have a dimension of one class."""

    node: fx.Node
    ignore_index: int = _NO_INDEX
    smoothing: float = 0.0
    is_index: bool = False


@dataclass(frozen=True)
class Reader:
    """A node that is a function of the losses of tokens; without labels, of their logsumexp."""

    node: fx.Node
    logits: Logits
    labels: Labels | None = None
    weight: fx.Node | None = None

    def replace_by(self, values: fx.Node, index: fx.Node | None, at: fx.Node) -> None:
        """Let the losses, or logsumexps, of tokens take the place of the node; ``index`` are the labels."""
        emit, call = partial(emit_like, at), op_call(self.node)
        dtype = dataflow.value(self.node).dtype
        if self.weight is not None:
            weights = class_weights(self.weight, index, self.labels.ignore_index, at)
            values = emit(aten.mul.Tensor, values, weights)
        if dataflow.value(values).dtype != dtype:
            values = emit(aten.to.dtype, values, dtype)
        if self.node.target in (aten.cross_entropy_loss.default, aten.nll_loss_nd.default):
            if call.argument("reduction") == SUM:
                values = emit(aten.sum.default, values)
        elif self.node.target is aten.gather.default:
            values = emit(aten.unsqueeze.default, emit(aten.neg.default, values), self.logits.dim)
        else:
            values = emit(aten.reshape.default, values, list(dataflow.shape(self.node)))
        succeed(self.node, values)


def readers_at(user: fx.Node, logits: Logits) -> Iterator[Reader | fx.Node]:
    """``user``, or what reads its log-softmax, as readers; nodes that need all logits as they are."""
    if user.op == "output" or not _in_region(user, logits):
        yield user
    elif user.target is aten.log_softmax.int:
        call = op_call(user)
        if user.args[:1] != (logits.node,) or _dim(call, logits) != logits.dim:
            yield user
            return
        logits = logits.converted(dataflow.value(user).dtype)
        for reader in user.users:
            found = _of_log_softmax(reader, user, logits) if reader.op != "output" else None
            yield reader if found is None or not _in_region(reader, logits) else found
    else:
        yield _of_logits(user, logits) or user


def class_weights(weight: fx.Node, labels: fx.Node, ignore_index: int, at: fx.Node) -> fx.Node:
    """The weight of each label's class, emitted in front of ``at``; of ignored labels any."""
    is_valid = emit_like(at, aten.ne.Scalar, labels, ignore_index)
    classes = emit_like(at, aten.where.ScalarOther, is_valid, labels, 0)
    return emit_like(at, aten.index.Tensor, weight, [classes])


def _in_region(node: fx.Node, logits: Logits) -> bool:
    return notes.region_of(node).grad_enabled == notes.region_of(logits.product.node).grad_enabled


def _dim(call: OpCall, logits: Logits) -> int:
    return call.argument("dim") % len(dataflow.shape(logits.node))


def _of_logits(user: fx.Node, logits: Logits) -> Reader | None:
    if user.args[:1] != (logits.node,):
        return None
    call = op_call(user) if dataflow.handles_tensors(user) else None
    if user.target is aten.cross_entropy_loss.default:
        return _cross_entropy(user, call, logits.converted(dataflow.value(user).dtype))
    if user.target is aten.logsumexp.default:
        dims = call.argument("dim")
        is_ours = [d % len(dataflow.shape(logits.node)) for d in dims] == [logits.dim] and logits.is_last
        return Reader(user, logits.converted(dataflow.value(user).dtype)) if is_ours else None
    return None


def _of_log_softmax(user: fx.Node, logs: fx.Node, logits: Logits) -> Reader | None:
    if user.args[:1] != (logs,):
        return None
    call = op_call(user) if dataflow.handles_tensors(user) else None
    if user.target is aten.nll_loss_nd.default:
        return _cross_entropy(user, call, logits)
    if user.target is aten.gather.default and _dim(call, logits) == logits.dim:
        index = dataflow.operands(user)[1]
        expected = list(dataflow.shape(logs))
        expected[logits.dim] = 1
        return Reader(user, logits, Labels(index, is_index=True)) if list(dataflow.shape(index)) == expected else None
    return None


def _cross_entropy(user: fx.Node, call: OpCall, logits: Logits) -> Reader | None:
    """Means were split before."""
    _, labels, *weight = dataflow.operands(user)
    smoothing = 0.0 if user.target is aten.nll_loss_nd.default else call.argument("label_smoothing")
    num_dims = len(dataflow.shape(logits.node))
    if call.argument("reduction") == MEAN or num_dims < 2 or logits.dim != 1:
        return None
    if dataflow.value(labels).dtype != torch.int64 or (weight and (smoothing or notes.note(weight[0]).differentiable)):
        return None
    return Reader(user, logits, Labels(labels, call.argument("ignore_index"), smoothing), *weight)
