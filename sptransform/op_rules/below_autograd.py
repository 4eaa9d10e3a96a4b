"""Ops that others are made of below autograd, and their derivatives: what bodies of custom autograd.Functions call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from sptransform.op_rules.pointwise import pointwise
from sptransform.op_rules.reduction import along_dim, reduction
from sptransform.rules.factors import dim_of
from sptransform.rules.rule import Dims, OpCall, OpRule, RuleFn, Shape
from sptransform.rules.table import OpEntry

aten = torch.ops.aten


def normed(call: OpCall) -> OpRule | None:
    """A norm over trailing dimensions, or its derivative; a weight's gradient is a sum over the leading ones.

    None for a derivative that leaves out a result.
    """
    is_derivative = call.target is aten.native_layer_norm_backward.default
    trailing = len(call.argument("normalized_shape"))
    full = max(call.operand_shapes, key=len)
    leading = len(full) - trailing
    if is_derivative and not all(call.argument("output_mask")):
        return None

    def dims_of(shape: Shape) -> Dims:
        names = [f"i{dim}" for dim in range(len(full) - len(shape), len(full))]
        return tuple(dim_of(name, size) for name, size in zip(names, shape, strict=True))

    operands, results = (tuple(map(dims_of, shapes)) for shapes in (call.operand_shapes, call.result_shapes))
    sizes = {f"i{dim}": size for dim, size in enumerate(full) if size != 1}
    outer = frozenset(f"i{dim}" for dim in range(leading)) & set(sizes)
    return OpRule(
        operands,
        results,
        sizes,
        reduce=outer if is_derivative else frozenset(),
        replicated=frozenset(sizes) - outer,
    )


def derivative_along_dim(call: OpCall) -> OpRule:
    """The derivative of what runs along a dimension: two operands of one shape."""
    found = along_dim(call)
    return replace(found, operands=found.operands * 2)


TABLE: list[tuple[Any, OpEntry | RuleFn]] = [
    (aten._log_softmax_backward_data.default, derivative_along_dim),
    (aten._softmax_backward_data.default, derivative_along_dim),
    (aten._to_copy.default, pointwise()),
    (aten.elu_backward.default, pointwise()),
    (aten.hardtanh_backward.default, pointwise()),
    (aten.leaky_relu_backward.default, pointwise()),
    (aten.linalg_vector_norm.default, reduction(summed=False)),
    (aten.masked_fill.Tensor, pointwise()),
    (aten.native_layer_norm.default, normed),
    (aten.native_layer_norm_backward.default, normed),
    (aten.norm.ScalarOpt_dim, reduction(summed=False)),
    (aten.softplus_backward.default, pointwise()),
]
