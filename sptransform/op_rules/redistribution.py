"""Ops of a mesh dim that is distributed already, as the next mesh dim sees them: ops like any other."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

import sptransform.ops  # noqa: F401 - registers the ops this table names
from sptransform.op_rules.pointwise import LINEAR, pointwise
from sptransform.rule_table import Local, OpEntry
from sptransform.rules import Dims, OpCall, OpRule, RuleFn, Shape

sp = torch.ops.sptransform


def _moved(*arguments: str) -> RuleFn:
    """Every dimension passes but those along which the op moves parts, which the ``arguments`` spell out."""

    def apply(call: OpCall) -> OpRule:
        texts = [call.argument(name) for name in arguments]
        specs = [text for x in texts for text in ([x] if isinstance(x, str) else x)]
        moved = {int(dim) for spec in specs for dim in re.findall(r"^S\((\d+):", spec)}
        return _passing(call, moved, linear=True)

    return apply


def _passing(call: OpCall, moved: Iterable[int], linear: bool) -> OpRule:
    """Tensor ``i`` goes in and comes out; dimension ``d`` of several tensors is one factor where they have one size."""
    sizes: dict[str, Any] = {}

    def dims(shape: Shape, side: str, index: int) -> Dims:
        named = []
        for dim, size in enumerate(shape):
            passes = dim not in moved and all(other[dim : dim + 1] == (size,) for other in call.operand_shapes)
            name = f"d{dim}" if passes else f"{side}{index}.{dim}"
            named.append((name,) if size != 1 else ())
            if size != 1:
                sizes[name] = size
        return tuple(named)

    operands = tuple(dims(shape, "from", i) for i, shape in enumerate(call.operand_shapes))
    results = tuple(dims(shape, "to", i) for i, shape in enumerate(call.result_shapes))
    return OpRule(
        operands,
        results,
        sizes,
        whole=frozenset(name for name in sizes if not name.startswith("d")),
        linear=(frozenset(range(len(operands))),) if linear else (),
    )


def _whole(call: OpCall) -> OpRule:
    """Parameters, which no strategy cuts here."""
    return _passing(call, range(max(map(len, call.operand_shapes))), linear=False)


def _mask_local(call: OpCall, local: Local) -> Any:
    """The parts of one rank differ among themselves as those of ranks do."""
    return local.run(call, group_name=f"{call.argument('group_name')},{local.group}")


TABLE: list[tuple[Any, OpEntry | RuleFn]] = [
    (sp.all_to_all.default, _moved("sources", "targets")),
    (sp.cut.default, _moved("spec")),
    (sp.dropout_mask.default, OpEntry(pointwise(), _mask_local)),
    (sp.first_rank.default, pointwise(LINEAR)),
    (sp.gather.default, _moved("spec")),
    (sp.gather_packed.default, _moved("specs")),
    (sp.keep_own.default, _moved("source", "target")),
    (sp.repartition.default, _moved("source", "target")),
    (sp.replicate.default, _whole),
    (sp.sum.default, pointwise(LINEAR)),
    (sp.sum_scatter.default, _moved("spec")),
]
