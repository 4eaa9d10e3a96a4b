"""Insert a redistribute on every edge whose producer is not placed as its consumer demands.

Before: ``%o = attention(%q, ...)`` where ``%q`` is ``S(2)`` and ``S(1)`` is demanded; after::

    %q1 : S(1) = redistribute(%q, S(2) -> S(1))
    %o = attention(%q1, ...)

1. Edges from one producer to the same placement share a redistribute, where autocast and grad mode are the same.
2. A redistribute stands right before its first reader; one of a placeholder to R stands after the placeholders, where
   neither autocast nor ``no_grad`` regions are open.
3. S -> S along the same axis, where each index only gets another owner, is one redistribute; S -> S along two axes of
   the same dimension, or where ranks share indices, goes through I.
4. If ranks share indices of a shard (key heads), only the first owner's copy is moved on.
5. Under a user's ``no_grad`` the graph may still have regions with gradients (``enable_grad``). What such a region
   reads is moved inside of it, and what it returns to the caller is moved right behind its producer.
6. Tensors the graph returns become I; where ``outputs`` keeps shards, a sharded dimension becomes one that DTensor can
   express: contiguous chunks in the original order, or I where its axis is only a part of a dimension of open size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import fx

from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.engine.verifier import satisfies
from sptransform.graph import dataflow, notes
from sptransform.graph.edit import replace_operand
from sptransform.graph.redistribute import insert_redistribute
from sptransform.graph.regions import Region
from sptransform.sharding.partition import Partition
from sptransform.sharding.placement import I, Placement, R, Shard, keeps_own, needs_full_tensor, repartitions


@dataclass
class _Inserter:
    """Redistributes made so far, by producer, target placement and region."""

    first: fx.Node
    made: dict[tuple[fx.Node, Placement, Region], fx.Node] = field(default_factory=dict)

    def moved(self, producer: fx.Node, target: Placement, before: fx.Node) -> fx.Node:
        source = notes.placement(producer)
        around, region = notes.region_around(before.graph), notes.region_of(before)
        hoisted = producer.op == "placeholder" and target == R and around.grad_enabled >= region.grad_enabled
        key = (producer, target, around if hoisted else region)
        if key not in self.made:
            if isinstance(source, Shard) and not source.partition.is_exact and not keeps_own(source, target):
                own = replace(source, partition=source.partition.first_owners())
                producer, source = self.moved(producer, own, before), own
            if needs_full_tensor(source, target):
                producer, source = self.moved(producer, I, before), I
            (self.made[key],) = insert_redistribute(
                self.first if hoisted else before, [producer], [(source, target)]
            )
        return self.made[key]


@dataclass(frozen=True)
class InsertRedistributes(Pass):
    requires = frozenset({"functional", "placed"})
    ensures = frozenset({"functional", "placed", "typed"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        nodes = list(graph.nodes)
        inserter = _Inserter(next(n for n in nodes if n.op != "placeholder"))
        for node in nodes:
            note = notes.note(node)
            if node.op == "output":
                self._return(node, inserter, context)
            elif note.decision is not None:
                operands = dataflow.operands(node)
                for index, demanded in enumerate(note.decision.demands(note.rule, len(operands))):
                    if demanded is not None:
                        self._satisfy(node, index, operands[index], demanded, node, inserter)

    def _satisfy(
        self, node: fx.Node, index: int, producer: fx.Node, demanded: Placement, before: fx.Node, inserter: _Inserter
    ) -> None:
        actual = notes.placement(producer)
        if not satisfies(actual, demanded, notes.note(producer).differentiable):
            replace_operand(node, index, inserter.moved(producer, demanded, before))

    def _return(self, node: fx.Node, inserter: _Inserter, context: Context) -> None:
        for index, producer in enumerate(dataflow.operands(node)):
            returned = _returned(notes.placement(producer), context)
            passes_gradient = notes.note(producer).differentiable and not notes.region_of(node).grad_enabled
            self._satisfy(node, index, producer, returned, producer.next if passes_gradient else node, inserter)
        leaves = node.args[0] if isinstance(node.args[0], list | tuple) else [node.args[0]]
        context.result.output_placements = tuple(
            notes.placement(x) if isinstance(x, fx.Node) and dataflow.is_tensor(x) else None for x in leaves
        )


def _returned(actual: Placement | None, context: Context) -> Placement:
    """Placement in which the graph returns a tensor placed ``actual``."""
    if context.returns_whole or not isinstance(actual, Shard):
        return I
    if context.outputs == "kept":
        return actual if actual.outer == 1 and actual.partition.is_exact else I
    if actual.outer != 1 and not isinstance(actual.dim_size, int):
        return I
    chunks = Shard(actual.dim, Partition.contiguous(actual.dim_size, actual.partition.num_ranks))
    return chunks if actual == chunks or repartitions(actual, chunks) else I
