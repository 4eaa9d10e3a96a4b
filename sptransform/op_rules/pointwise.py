"""Pointwise ops. An op that torch tags ``pointwise`` needs an entry here only if a pending sum passes through it.

A few ops that some torch versions do not tag have an entry too.
"""

from __future__ import annotations

from typing import Any

import torch

import sptransform.ops  # noqa: F401 - registers the ops this table names
from sptransform.rules.einsum import rule
from sptransform.rules.factors import dim_of, dims_and_sizes
from sptransform.rules.rule import OpCall, OpRule, RuleFn
from sptransform.rules.table import Local, OpEntry

aten = torch.ops.aten


_LINEAR_IN_EACH = ((0,), (1,))
_LINEAR_JOINTLY = ((0, 1),)
LINEAR = ((0,),)


def pointwise(linear: tuple[tuple[int, ...], ...] = ()) -> RuleFn:
    """Any number of operands, which broadcast to the result."""

    def apply(call: OpCall) -> OpRule:
        operands = ", ".join(["..."] * len(call.operand_shapes))
        results = ", ".join(["..."] * len(call.result_shapes))
        possible = tuple(each for each in linear if all(i < len(call.operand_shapes) for i in each))
        return rule(f"{operands} -> {results}", linear=possible)(call)

    return apply


def broadcast(call: OpCall) -> OpRule:
    """Every operand expanded to the shape of all: what reaches one result comes from one operand."""
    return pointwise((tuple(range(len(call.operand_shapes))),))(call)


def converted(call: OpCall) -> OpRule:
    """Conversion to the dtype of a second operand of any shape. Where their sizes agree, both share a factor."""
    shape, other = call.operand_shapes
    dims, sizes = dims_and_sizes(shape, [f".{place}" for place in range(len(shape), 0, -1)])
    lent: list[tuple[str, ...]] = []
    own: dict[str, int] = {}
    for place, size in zip(range(len(other), 0, -1), other, strict=True):
        if size == 1 or sizes.get(f".{place}") == size:
            lent.append(dim_of(f".{place}", size))
        else:
            lent.append((f"o{place}",))
            own[f"o{place}"] = size
    return OpRule((dims, tuple(lent)), (dims,), sizes | own, replicated=frozenset(own))


def default_entry(target: Any) -> OpEntry | None:
    """The entry of an op that no table lists: pointwise if torch tags it so and it draws no random numbers."""
    tags = getattr(target, "tags", ())
    if torch.Tag.pointwise not in tags or torch.Tag.nondeterministic_seeded in tags:
        return None
    gives_tensors = all(isinstance(result.type, torch.TensorType) for result in target._schema.returns)
    return OpEntry(pointwise()) if gives_tensors else None


def _dropout(call: OpCall, local: Local) -> Any:
    """Each rank draws its own mask for its own part; the default generators of the ranks stay in step."""
    p = call.argument("p")
    if not call.argument("train") or p == 0.0:
        return local.run(call)
    (x,) = local.operands
    mask = local.emit(torch.ops.sptransform.dropout_mask.default, (x, p, local.group), {})
    kept = local.emit(aten.mul.Tensor, (x, mask), {})
    return local.emit(aten.mul.Tensor, (kept, 0.0 if p == 1.0 else 1.0 / (1.0 - p)), {})


# `aten.to` may narrow the dtype, and a sum of rounded parts is not the rounded sum: not linear.
TABLE: list[tuple[Any, OpEntry | RuleFn]] = [
    (aten.__and__.Tensor, pointwise()),
    (aten.__or__.Tensor, pointwise()),
    (aten.add.Tensor, pointwise(_LINEAR_JOINTLY)),
    (aten.alias.default, pointwise(LINEAR)),
    (aten.broadcast_tensors.default, broadcast),
    (aten.clone.default, pointwise(LINEAR)),
    (aten.contiguous.default, pointwise(LINEAR)),
    (aten.detach.default, pointwise(LINEAR)),
    (aten.div.Scalar, pointwise(LINEAR)),
    (aten.div.Tensor, pointwise(LINEAR)),
    (aten.dropout.default, OpEntry(pointwise(), _dropout)),
    (aten.floor_divide.Scalar, pointwise()),
    (aten.floor_divide.default, pointwise()),
    (aten.gelu.default, pointwise()),
    (aten.hardswish.default, pointwise()),
    (aten.leaky_relu.default, pointwise()),
    (aten.lift_fresh_copy.default, pointwise()),
    (aten.log_sigmoid.default, pointwise()),
    (aten.mul.Scalar, pointwise(LINEAR)),
    (aten.mul.Tensor, pointwise(_LINEAR_IN_EACH)),
    (aten.neg.default, pointwise(LINEAR)),
    (aten.rsub.Tensor, pointwise(_LINEAR_JOINTLY)),
    (aten.selu.default, pointwise()),
    (aten.sub.Tensor, pointwise(_LINEAR_JOINTLY)),
    (aten.to.device, pointwise()),
    (aten.to.dtype, pointwise()),
    (aten.to.dtype_layout, pointwise()),
    (aten.to.other, converted),
    (aten.type_as.default, converted),
    (aten.where.Scalar, pointwise()),
    (aten.where.ScalarOther, pointwise()),
    (aten.where.ScalarSelf, pointwise()),
    (torch.ops.sptransform.before_write.default, pointwise(LINEAR)),
    (torch.ops.sptransform.normalized.default, pointwise()),
    (torch.ops.sptransform.with_value.default, pointwise()),
]
