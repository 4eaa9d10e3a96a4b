"""Lower every redistribute to the op that performs it, see :mod:`sptransform.ops.redistribute`.

Before: ``%q1 : S(1) = redistribute([%q], S(2) -> S(1))``; after: ``%q1 = sptransform.all_to_all([%q], ...)``.

1. Packed moves (S -> S to another dimension, I -> R of gradient buckets, S -> R of keys and values) become one op of
   several tensors.
2. Others become one op per tensor.
3. In a checkpointed region the result is saved, not recomputed: recomputing would communicate again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow, notes
from sptransform.graph.edit import rename, succeed_outputs
from sptransform.graph.redistribute import is_redistribute, keep_result
from sptransform.sharding.placement import cut_alike, keeps_own, kind

_ops = torch.ops.sptransform

# (from, to) -> op and its arguments after the tensor, given both placements and the group's name
_SINGLE: dict[tuple[str, str], tuple[Any, Callable[[Any, Any, str], tuple[Any, ...]]]] = {
    ("I", "P"): (_ops.first_rank.default, lambda s, t, group: (group, True)),
    ("I", "S"): (_ops.slice.default, lambda s, t, group: (t.spec, group, True)),
    ("P", "I"): (_ops.all_reduce.default, lambda s, t, group: (group, True)),
    ("P", "R"): (_ops.all_reduce.default, lambda s, t, group: (group, False)),
    ("P", "S"): (_ops.reduce_scatter.default, lambda s, t, group: (t.spec, group)),
    ("R", "I"): (_ops.first_rank.default, lambda s, t, group: (group, False)),
    ("R", "S"): (_ops.slice.default, lambda s, t, group: (t.spec, group, False)),
    ("S", "I"): (_ops.all_gather.default, lambda s, t, group: (s.spec, group, True)),
    ("S", "R"): (_ops.all_gather.default, lambda s, t, group: (s.spec, group, False)),
    ("S", "S"): (_ops.repartition.default, lambda s, t, group: (s.spec, t.spec, group)),
}
_KEEP_OWN = _ops.keep_own.default, lambda s, t, group: (s.spec, t.spec, group)


@dataclass(frozen=True)
class LowerRedistributes(Pass):
    requires = frozenset({"typed"})
    ensures = frozenset({"functional", "placed", "typed", "lowered"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        for node in list(graph.nodes):
            if not is_redistribute(node):
                continue
            notes.note(node).mesh = context.mesh
            transitions = notes.note(node).transitions
            kinds = {(kind(source), kind(target)) for source, target in transitions}
            if kinds == {("S", "S")} and not cut_alike(*transitions[0]):
                specs = [source.spec for source, _ in transitions], [target.spec for _, target in transitions]
                _relabel(node, _ops.all_to_all.default, (node.args[0], *specs, context.mesh.group))
            elif kinds == {("S", "R")} and len(transitions) > 1:
                specs = [source.spec for source, _ in transitions]
                _relabel(node, _ops.all_gather_packed.default, (node.args[0], specs, context.mesh.group))
            elif kinds == {("I", "R")}:
                _relabel(node, _ops.replicate.default, (node.args[0], context.mesh.group))
            else:
                _lower_single(node, context.mesh.group)


def _relabel(node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    node.target, node.args = target, args
    rename(node, target._schema.name.split("::")[1])
    keep_result(node)


def _lower_single(node: fx.Node, group: str) -> None:
    ((source, target),) = notes.note(node).transitions
    op, arguments = _KEEP_OWN if keeps_own(source, target) else _SINGLE[kind(source), kind(target)]
    with node.graph.inserting_before(node):
        new = node.graph.call_function(op, (node.args[0][0], *arguments(source, target, group)))
    notes.fork(node, new)
    (new.meta["val"],) = dataflow.values(node)
    keep_result(new)
    succeed_outputs(node, [new])
