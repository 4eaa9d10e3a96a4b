"""Norms over more than the last dimensions, as what they compute: batch norms in training, instance and group norms.

Ranks that share rows of an image share the mean that torch's ops take of them. And where those ops keep running
statistics, they write these without saying so in their schema. Before: ``%y = aten.batch_norm(%x, %w, %b, %m, %v, True,
0.1, 1e-05)``; after::

    %var, %mean = aten.var_mean(%x, [0, 2, 3], correction=0, keepdim=True)
    %m1 = aten.copy_(%m, lerp(%m, %mean, 0.1))
    %v1 = aten.copy_(%v, lerp(%v, %var * n / (n - 1), 0.1))
    %y = (%x - %mean) * rsqrt(%var + 1e-05) * %w + %b

Means are taken in float32 of 16 bits, as on one device. A batch norm in evaluation stays: each entry is for itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import fx

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
    ndim = len(dataflow.shape(given["input"]))
    y, var, mean, count = _centred(emit, given["input"], [0, *range(2, ndim)], given["eps"])
    _keep(emit, given, var, mean, count)
    return _scaled(emit, y, given)


def _instance_norm(node: fx.Node, emit: Emit, given: dict[str, Any]) -> fx.Node:
    x = given["input"]
    if not given["use_input_stats"]:
        names = ("weight", "bias", "running_mean", "running_var")
        return emit(aten.batch_norm.default, x, *map(given.get, names), False, 0.0, given["eps"], False)
    y, var, mean, count = _centred(emit, x, list(range(2, len(dataflow.shape(x)))), given["eps"])
    var, mean = (emit(aten.mean.dim, statistic, [0], True) for statistic in (var, mean))
    _keep(emit, given, var, mean, count)
    return _scaled(emit, y, given)


def _group_norm(node: fx.Node, emit: Emit, given: dict[str, Any]) -> fx.Node:
    x, num_groups = given["input"], given["num_groups"]
    shape = dataflow.shape(x)
    grouped = emit(aten.unflatten.int, x, 1, [num_groups, shape[1] // num_groups])
    y, *_ = _centred(emit, grouped, list(range(2, len(shape) + 1)), given["eps"])
    return _scaled(emit, emit(aten.flatten.using_ints, y, 1, 2), given)


def _centred(emit: Emit, x: fx.Node, dims: list[int], eps: float) -> tuple[fx.Node, fx.Node, fx.Node, Size]:
    """``x`` with mean 0 and variance 1 over ``dims``, its variance and mean before, and of how many entries."""
    dtype = dataflow.value(x).dtype
    wide = emit(aten.to.dtype, x, torch.float32) if dtype.itemsize < 4 else x
    both = emit(aten.var_mean.correction, wide, dims, correction=0, keepdim=True)
    var, mean = (emit(operator.getitem, both, index) for index in range(2))
    scale = emit(aten.rsqrt.default, emit(aten.add.Tensor, var, eps))
    y = emit(aten.mul.Tensor, emit(aten.sub.Tensor, wide, mean), scale)
    return y, var, mean, prod(dataflow.shape(x)[dim] for dim in dims)


def _scaled(emit: Emit, y: fx.Node, given: dict[str, Any]) -> fx.Node:
    """``y`` times the weight of each channel, plus its bias, in the dtype of the norm's input."""
    ndim = len(dataflow.shape(y))
    for name, op in (("weight", aten.mul.Tensor), ("bias", aten.add.Tensor)):
        if given[name] is not None:
            shape = [-1, *[1] * (ndim - 2)]
            y = emit(op, y, emit(aten.reshape.default, given[name], shape))
    dtype = dataflow.value(given["input"]).dtype
    return y if dataflow.value(y).dtype == dtype else emit(aten.to.dtype, y, dtype)


def _keep(emit: Emit, given: dict[str, Any], var: fx.Node, mean: fx.Node, count: Size) -> None:
    """Write the running statistics, of which the variance is unbiased."""
    if given["running_mean"] is None:
        return
    var, mean = (emit(aten.detach.default, statistic) for statistic in (var, mean))
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
