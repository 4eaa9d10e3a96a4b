"""Norms over more than the last dimensions, as what they compute: batch norms in training, instance and group norms.

Ranks that share rows of an image share the mean that torch's ops take of them. And where those ops keep running
statistics, they write these without saying so in their schema. Before: ``%y = aten.batch_norm(%x, %w, %b, %m, %v, True,
0.1, 1e-05)``; after::

    %var, %mean = aten.var_mean(%x, [0, 2, 3], correction=0, keepdim=True)
    %m1 = aten.copy_(%m, lerp(%m, %mean, 0.1))
    %v1 = aten.copy_(%v, lerp(%v, %var * n / (n - 1), 0.1))
    %y = sptransform.normalized(%x, %mean, %var, %w, %b, 1e-05)

Means are taken in float32 of 16 bits, as on one device. A batch norm in evaluation stays: each entry is for itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import fx

import sptransform.ops  # noqa: F401 - registers the op that this module emits
from sptransform.graph import dataflow, notes
from sptransform.graph.calls import arguments_of
from sptransform.graph.edit import emit_like, succeed
from sptransform.sharding.sizes import Size

aten = torch.ops.aten

Emit = Callable[..., fx.Node]


def open_norms(graph: fx.Graph) -> None:
    """Rewrite all norms of ``graph`` that average over a dimension of rows."""
    for node in list(graph.nodes):
        form = _FORMS.get(node.target) if node.op == "call_function" else None
        found = None if form is None else form(node, *_arguments(node))
        if found is not None:
            succeed(node, found)


def _arguments(node: fx.Node) -> tuple[Emit, dict[str, Any]]:
    def emit(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        new = emit_like(node, target, *args, **kwargs)
        notes.note(new).differentiable &= notes.region_of(node).grad_enabled
        return new

    given, _ = arguments_of(node)
    return emit, given


def _batch_norm(node: fx.Node, emit: Emit, given: dict[str, Any]) -> fx.Node | None:
    if not given["training"]:
        return None
    x = given["input"]
    mean, var, count = _moments(emit, x, [0, *range(2, len(dataflow.shape(x)))])
    _keep(emit, given, mean, var, count)
    return _normalized(emit, x, mean, var, given)


def _instance_norm(node: fx.Node, emit: Emit, given: dict[str, Any]) -> fx.Node:
    x = given["input"]
    if not given["use_input_stats"]:
        names = ("weight", "bias", "running_mean", "running_var")
        return emit(aten.batch_norm.default, x, *map(given.get, names), False, 0.0, given["eps"], False)
    mean, var, count = _moments(emit, x, list(range(2, len(dataflow.shape(x)))))
    _keep(emit, given, *(emit(aten.mean.dim, moment, [0], True) for moment in (mean, var)), count)
    return _normalized(emit, x, mean, var, given)


def _group_norm(node: fx.Node, emit: Emit, given: dict[str, Any]) -> fx.Node:
    x, num_groups = given["input"], given["num_groups"]
    shape = dataflow.shape(x)
    grouped = emit(aten.unflatten.int, x, 1, [num_groups, shape[1] // num_groups])
    mean, var, _ = _moments(emit, grouped, list(range(2, len(shape) + 1)))
    return emit(aten.flatten.using_ints, _normalized(emit, grouped, mean, var, given, num_groups), 1, 2)


def _moments(emit: Emit, x: fx.Node, dims: list[int]) -> tuple[fx.Node, fx.Node, Size]:
    """Mean and variance of ``x`` over ``dims``, and of how many entries."""
    wide = emit(aten.to.dtype, x, torch.float32) if dataflow.value(x).dtype.itemsize < 4 else x
    both = emit(aten.var_mean.correction, wide, dims, correction=0, keepdim=True)
    var, mean = (emit(operator.getitem, both, index) for index in range(2))
    return mean, var, prod(dataflow.shape(x)[dim] for dim in dims)


def _normalized(
    emit: Emit, x: fx.Node, mean: fx.Node, var: fx.Node, given: dict[str, Any], num_groups: int | None = None
) -> fx.Node:
    """With the weight and bias of each channel, which are one dimension, or two if in groups."""
    num_tail = len(dataflow.shape(x)) - (2 if num_groups is None else 3)
    shape = [*([] if num_groups is None else [num_groups]), -1, *[1] * num_tail]
    channels = [given[name] for name in ("weight", "bias")]
    channels = [None if x is None else emit(aten.reshape.default, x, shape) for x in channels]
    return emit(torch.ops.sptransform.normalized.default, x, mean, var, *channels, given["eps"])


def _keep(emit: Emit, given: dict[str, Any], mean: fx.Node, var: fx.Node, count: Size) -> None:
    """Write the running statistics, of which the variance is unbiased."""
    if given["running_mean"] is None:
        return
    mean, var = (emit(aten.detach.default, moment) for moment in (mean, var))
    var = emit(aten.div.Scalar, emit(aten.mul.Scalar, var, count), count - 1)
    for running, now in ((given["running_mean"], mean), (given["running_var"], var)):
        now = emit(aten.reshape.default, now, [-1])
        now = emit(aten.to.dtype, now, dataflow.value(running).dtype)
        emit(aten.copy_.default, running, emit(aten.lerp.Scalar, running, now, given["momentum"]))


_FORMS: dict[Any, Callable[[fx.Node, Emit, dict[str, Any]], fx.Node | None]] = {
    aten.batch_norm.default: _batch_norm,
    aten.group_norm.default: _group_norm,
    aten.instance_norm.default: _instance_norm,
}
