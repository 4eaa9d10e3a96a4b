"""Ops that create tensors from sizes. Uniform tensors are created per shard, counting ones in full and then cut."""

from __future__ import annotations

from typing import Any

import torch

from sptransform.rules.factors import dims_and_sizes
from sptransform.rules.rule import OpCall, OpRule, RuleFn
from sptransform.rules.table import Local, OpEntry

aten = torch.ops.aten


def uniform(call: OpCall) -> OpRule:
    """All entries are equal: any dimension of the result may be cut. Operands only set dtype and device."""
    dims, sizes = dims_and_sizes(call.result_shapes[0])
    operands, replicated = [], {}
    for index, shape in enumerate(call.operand_shapes):
        own, own_sizes = dims_and_sizes(shape, [f"o{index}.{d}" for d in range(len(shape))])
        operands.append(own)
        replicated |= own_sizes
    unread = frozenset(range(len(operands)))
    return OpRule(tuple(operands), (dims,), sizes | replicated, replicated=frozenset(replicated), unread=unread)


def counting(call: OpCall) -> OpRule:
    """Entries depend on their position: every rank computes the full tensor, which is then cut."""
    dims, sizes = dims_and_sizes(call.result_shapes[0])
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
