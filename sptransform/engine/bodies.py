"""The rule of a custom autograd.Function, derived from the rules of the ops that its forward and its backward run.

Every dimension of the operands is a product of axes (see :mod:`sptransform.engine.axes`). An axis may be cut if every
op that meets it, forward and backward, runs on the cut tensors without a move; then each rank computes its part of the
results, and from its part of their gradients

1. its part of the gradient of each operand that has the axis;
2. a pending sum as the gradient of each other operand: what the backward sums, and after the sum only linear ops.

A result that sums over the axis is a pending sum itself, whose gradient is whole. Any other axis is ``replicated``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx

from sptransform.engine.axes import Atom, Axes
from sptransform.engine.decided import decide, demanded
from sptransform.graph import dataflow, notes
from sptransform.graph.body_graphs import FUNCTION, BodyGraph, body_of, graph_of
from sptransform.graph.calls import rule_at
from sptransform.ops.body import parse
from sptransform.rules.decision import Decision, Pending, Replicate, Sharded, decision_for
from sptransform.rules.rule import Dims, OpRule
from sptransform.rules.table import RuleTable
from sptransform.sharding.partition import Partition
from sptransform.sharding.placement import P, Placement, R, Shard

aten = torch.ops.aten

# The gradient of an operand is converted to the operand's dtype before it is summed over ranks, as any gradient is
_CASTS = frozenset({aten._to_copy.default, aten.to.dtype})

Placed = dict[fx.Node, Placement]


def has_body(node: fx.Node) -> bool:
    return node.target == FUNCTION


def rule_of_body(node: fx.Node, rules: RuleTable) -> OpRule:
    """The rule of the function that ``node`` runs. Axes that it cannot cut are ``replicated``."""
    body = body_with_rules(node, rules)
    rule = _unproved(body)
    for name, size in rule.sizes.items():
        decision = Sharded(name, Partition.contiguous(size, 2))
        if name not in rule.replicated and runs_on_shards(body, rule, decision):
            if any(placement == P for placement in decision.outcomes(rule, len(rule.results))):
                rule = replace(rule, reduce=rule.reduce | {name})
        else:
            rule = replace(rule, replicated=rule.replicated | {name})
    return replace(rule, whole_gradient=not _passes_pending(body), placements={})


def body_with_rules(node: fx.Node, rules: RuleTable) -> BodyGraph:
    """The graph of what ``node`` runs, each node with its rule, if it has one."""
    body = graph_of(parse(body_of(node)), [dataflow.value(x) for x in dataflow.operands(node)])
    for inner in body.graph.nodes:
        if dataflow.handles_tensors(inner):
            notes.note(inner).rule = rule_at(inner, rules)
    return body


def runs_on_shards(body: BodyGraph, rule: OpRule, decision: Sharded) -> bool:
    """Whether the body, run on shards as decided, gives the shards it should. Notes how each of its nodes is run."""
    if any(map(dataflow.writes, body.graph.nodes)):  # what was written is not what its node's decision says
        return False
    operands = decision.demands(rule, len(body.operands))
    results = decision.outcomes(rule, len(body.results))
    inputs = dict(zip(body.operands, operands, strict=True))
    # the gradient of a pending sum is whole; of what every rank needs whole, it is a pending sum
    inputs |= {x: R if placed == P else placed for x, placed in zip(body.given, results, strict=True)}
    expected = list(zip(body.results, results, strict=True))
    expected += [
        (x, P if placed == R else placed)
        for x, placed in zip(body.gradients, operands, strict=True)
        if x is not None
    ]
    return _propagate(body, inputs, expected)


def _unproved(body: BodyGraph) -> OpRule:
    """The rule of the body, if every axis could be cut but those that a tensor has twice."""
    axes = Axes(body.graph, lambda size: Partition.contiguous(size, 1), {})
    names: dict[Atom, str] = {}
    tensors = [[axes.dims(x) for x in nodes] for nodes in (body.operands, body.results)]
    twice: set[str] = set()

    def named(dims: list[list[Atom]]) -> Dims:
        found = tuple(tuple(names.setdefault(atom, f"a{len(names)}") for atom in dim) for dim in dims)
        twice.update(name for name, times in Counter(name for dim in found for name in dim).items() if times > 1)
        return found

    operands, results = (tuple(map(named, each)) for each in tensors)
    return OpRule(
        operands,
        results,
        {name: atom.size for atom, name in names.items()},
        replicated=frozenset(twice),
        heavy=any(note.rule is not None and note.rule.heavy for note in map(notes.note, body.graph.nodes)),
    )


def _passes_pending(body: BodyGraph) -> bool:
    """Whether the backward is linear in the gradients it is given, so that it may be given pending sums."""
    inputs: Placed = {**dict.fromkeys(body.operands, R), **dict.fromkeys(body.given, P)}
    return _propagate(body, inputs, [(x, P) for x in body.gradients if x is not None])


def _propagate(body: BodyGraph, inputs: Placed, expected: list[tuple[fx.Node, Placement]]) -> bool:
    """Decide every node, given how placeholders are placed; whether all edges, and what is expected, agree."""
    nodes = [x for x in body.graph.nodes if x.op != "output" and dataflow.projection(x) is None]
    light: set[fx.Node] = set()  # made of what every rank has whole: cut where all readers want that
    backward = set(nodes[nodes.index(body.given[0]) :])
    for node in nodes:
        if node in inputs:
            notes.set_placement(node, inputs[node])
        else:
            firm = _firm(node, light)
            if all(placement == R for placement in firm.values()):
                light.add(node)
            decide(node, _forward(node, firm, node in backward))
    for node in reversed(nodes):
        if node in light:
            asked = {placement for placement in demanded(node) if placement is not None}
            asked |= {placement for x, placement in expected if x is node}
            decide(node, _backward(node, asked))
    for node in nodes:
        if node not in inputs:
            operands = dataflow.operands(node)
            asked = notes.note(node).decision.demands(notes.note(node).rule, len(operands))
            pairs = zip(operands, asked, strict=True)
            if any(want is not None and notes.placement(x) != want for x, want in pairs):
                return False
    return all(notes.placement(x) == placement for x, placement in expected)


def _firm(node: fx.Node, light: set[fx.Node]) -> dict[int, Placement]:
    """Operand -> its placement, of those operands that are read and are not light."""
    rule = notes.note(node).rule
    unread = frozenset() if rule is None else rule.unread
    return {
        i: notes.placement(x)
        for i, x in enumerate(dataflow.operands(node))
        if i not in unread and (dataflow.projection(x) or (x,))[0] not in light
    }


def _forward(node: fx.Node, firm: Mapping[int, Placement], is_backward: bool) -> Decision:
    """How to run a node on operands that are placed so; replicated if it cannot be."""
    rule = notes.note(node).rule
    if rule is None or rule.unrepeatable:
        return Replicate(R)
    pending = frozenset(i for i, placement in firm.items() if placement == P)
    is_cast = node.target in _CASTS and dataflow.value(node).dtype.is_floating_point
    if pending in rule.linear or (pending and is_backward and is_cast):
        return Pending(pending)
    for index, placement in firm.items():
        if isinstance(placement, Shard):
            decision = _cut(rule, rule.operands[index], placement)
            if decision is not None and all(decision.demand(rule, i) == placed for i, placed in firm.items()):
                return decision
    return Replicate(R)


def _backward(node: fx.Node, asked: set[Placement]) -> Decision:
    """How to run a light node of which all readers ask the same."""
    rule = notes.note(node).rule
    if rule is not None and not rule.unrepeatable and len(asked) == len(rule.results) == 1:
        (placement,) = asked
        if isinstance(placement, Shard):
            return _cut(rule, rule.results[0], placement) or Replicate(R)
    return Replicate(R)


def _cut(rule: OpRule, dims: Dims, shard: Shard) -> Sharded | None:
    """The decision that gives a tensor with ``dims`` this shard, for a factor that goes through as it is."""
    decision = decision_for(rule, dims, shard)
    if decision is None or not decision.is_allowed(rule) or decision.communicates(rule):
        return None
    return None if any(name == decision.factor for _, _, name in rule.resize) else decision
