"""Ops that create tensors from sizes. Uniform tensors are created per shard, counting ones in full and then cut."""

from __future__ import annotations

from typing import Any

import torch

from sptransform.rules.rule import OpCall, OpRule, RuleFn
from sptransform.rules.table import Local, OpEntry

aten = torch.ops.aten


def _result_dims(call: OpCall) -> tuple[tuple[str, ...], ...]:
    return tuple((f"i{d}",) if size != 1 else () for d, size in enumerate(call.result_shapes[0]))


def uniform(call: OpCall) -> OpRule:
    """All entries are equal: any dimension of the result may be cut. Operands only set dtype and device."""
    dims = _result_dims(call)
    sizes = {factors[0]: size for factors, size in zip(dims, call.result_shapes[0], strict=True) if factors}
    operands = []
    for index, shape in enumerate(call.operand_shapes):
        own = tuple((f"o{index}.{d}",) if size != 1 else () for d, size in enumerate(shape))
        sizes |= {factors[0]: size for factors, size in zip(own, shape, strict=True) if factors}
        operands.append(own)
    replicated = frozenset(factors[0] for own in operands for factors in own if factors)
    return OpRule(tuple(operands), (dims,), sizes, replicated=replicated, unread=frozenset(range(len(operands))))


def counting(call: OpCall) -> OpRule:
    """Entries depend on their position: every rank computes the full tensor, which is then cut."""
    dims = _result_dims(call)
    sizes = {factors[0]: size for factors, size in zip(dims, call.result_shapes[0], strict=True) if factors}
    return OpRule((), (dims,), sizes, replicated=frozenset(sizes))


def _sized(call: OpCall, local: Local) -> Any:
    return local.run(call, size=list(local.result_shapes[0]))


_UNIFORM = OpEntry(uniform, _sized)


def _like(call: OpCall) -> OpRule:
    """``zeros_like`` and its kin: the result has the operand's dimensions."""
    base = uniform(call)
    return OpRule((base.results[0],), base.results, {f: s for f, s in base.sizes.items() if f not in base.replicated})


TABLE: list[tuple[Any, OpEntry | RuleFn]] = [
    (aten.arange.default, counting),
    (aten.arange.start, counting),
    (aten.arange.start_step, counting),
    (aten.empty.memory_format, _UNIFORM),
    (aten.empty_like.default, _like),
    (aten.full.default, _UNIFORM),
    (aten.full_like.default, _like),
    (aten.linspace.default, counting),
    (aten.new_empty.default, _UNIFORM),
    (aten.new_full.default, _UNIFORM),
    (aten.new_ones.default, _UNIFORM),
    (aten.new_zeros.default, _UNIFORM),
    (aten.ones.default, _UNIFORM),
    (aten.ones_like.default, _like),
    (aten.scalar_tensor.default, counting),
    (aten.zeros.default, _UNIFORM),
    (aten.zeros_like.default, _like),
]
