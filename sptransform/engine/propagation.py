"""Propagates placements from the attention that a strategy places to a decision for every node. Op-agnostic.

Three sweeps:

1. Forward, over *heavy* nodes (a contraction, attention, or anything computed from one): wherever the rule has one, an
   inner axis is sharded (if weights are cut), else the sequence; a pending sum passes where the rule is linear; else
   the node runs replicated.
2. Backward, over *light* nodes (computed from inputs without heavy work: positions, tables, masks): sharded if all
   consumers demand the same shard, else replicated, which costs no communication.
3. Backward: a replicated node becomes R instead of I if its gradient consists of pending sums only. The sum over the
   ranks is then taken once, at the parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from torch import fx

from sptransform.diagnostics.errors import UsageError, describe
from sptransform.engine.axes import Atom, Axes
from sptransform.engine.decided import decide, demanded
from sptransform.engine.inner_axes import InnerAxes
from sptransform.engine.strategy import Strategy
from sptransform.graph import dataflow, notes
from sptransform.rules.decision import Decision, Pending, Replicate, Sharded, decision_for
from sptransform.rules.rule import OpRule
from sptransform.sharding.partition import Partition
from sptransform.sharding.placement import I, P, Placement, R, Shard
from sptransform.sharding.sizes import order


@dataclass
class Propagation:
    """One run over a graph whose nodes carry rules.

    Args:
        graph: the graph to annotate with decisions and placements.
        strategy: places attention.
        num_ranks: size of the mesh dim.
        inputs: placement of every placeholder and attribute.
        axes: see :class:`Axes`.
        light: nodes without heavy work behind them, see :func:`light_nodes`.
        inner: axes to cut in preference to the sequence, see :class:`InnerAxes`; None if only the sequence is cut.
        is_only_dim: the mesh has no other dim.
    """

    graph: fx.Graph
    strategy: Strategy
    num_ranks: int
    inputs: dict[fx.Node, Placement]
    axes: Axes
    light: frozenset[fx.Node]
    inner: InnerAxes | None = None
    is_only_dim: bool = True

    def run(self) -> None:
        nodes = [n for n in self.graph.nodes if n.op != "output" and dataflow.projection(n) is None]
        for node in nodes:
            if node in self.inputs:
                notes.set_placement(node, self.inputs[node])
            elif node not in self.light and dataflow.handles_tensors(node):
                decide(node, self._forward(node))
        for node in reversed(nodes):
            if node in self.light and node not in self.inputs and dataflow.handles_tensors(node):
                decide(node, self._backward(node))
        for node in reversed(nodes):
            if node not in self.inputs and self._gradient_is_pending(node):
                decide(node, Replicate(R))

    def _forward(self, node: fx.Node) -> Decision:
        rule = notes.note(node).rule
        if rule is None:
            return Replicate(I)
        if rule.has_sequence:
            return self._place_attention(node, rule)
        candidates = self._inner_decisions(node, rule)
        operands = dataflow.operands(node)
        pending = frozenset(i for i, producer in enumerate(operands) if notes.placement(producer) == P)
        alone = all(len(producer.users) == 1 for producer in operands)  # another reader would reduce it anyway
        if not candidates and pending in rule.linear and 1 < len(pending) == len(operands) and alone:
            return Pending(pending)  # one reduction of the sum instead of one per term
        candidates = candidates or self.sequence_decisions(node, rule)
        if candidates:
            best = max(candidates, key=lambda decision: self._preference(node, rule, decision))
            if not self._reads_all_of_it(node, rule, best):
                return best
        return Pending(pending) if pending and pending in rule.linear else Replicate(I)

    def _place_attention(self, node: fx.Node, rule: OpRule) -> Decision:
        decision = self.strategy.place_attention(rule, self.num_ranks, lambda factor: self._partition(node, factor))
        if not isinstance(decision, Decision) or not decision.fits(rule, self.num_ranks):
            raise UsageError(
                describe(
                    f"{self.strategy} places attention by no decision for {self.num_ranks} ranks",
                    node=node,
                    found=f"{decision!r}; sizes of factors: {dict(rule.sizes)}",
                    fix="Sharded(rule.roles['heads'], partition), of the size of that factor and as many ranks",
                )
            )
        if not decision.is_allowed(rule):
            raise UsageError(
                describe(
                    f"{self.strategy} cuts attention in a way that its op cannot run",
                    node=node,
                    found=f"{decision}; roles: {', '.join(f'{role} {name}' for role, name in rule.roles.items())}; "
                    f"not to be cut: {', '.join(sorted(rule.replicated))}",
                    fix="a decision for another factor; a strategy that cuts queries or keys has reads_masks = True",
                )
            )
        return decision

    def _partition(self, node: fx.Node, factor: str) -> Partition:
        """Partition of a factor of an attention node. For a sequence, every index has exactly one owner."""
        atoms = self.axes.factor(node, factor)
        if self.inner is not None and atoms[0] in self.inner:
            return self.inner.partition(atoms[0]).refine(prod(atom.size for atom in atoms[1:]))
        if self.axes.is_sequence(atoms[0]) and (partition := self.axes.partition(atoms[0])).is_exact:
            # after uneven shares of blocks of tokens, ranks would each place a second mesh dim by themselves
            if len(atoms) == 1 or partition.is_even or self.is_only_dim:
                return partition.refine(prod(atom.size for atom in atoms[1:]))
        return self.axes.divide(prod(atom.size for atom in atoms))

    def sequence_decisions(self, node: fx.Node, rule: OpRule) -> list[Sharded]:
        """Every way to shard a sequence axis of the node, in the order of the rule's factors."""
        return self._decisions(node, rule, self.axes.is_sequence, self.axes.partition)

    def _inner_decisions(self, node: fx.Node, rule: OpRule) -> list[Sharded]:
        """Every way to shard an inner axis of the node."""
        if self.inner is None:
            return []
        return self._decisions(node, rule, self.inner.__contains__, self.inner.partition)

    def _decisions(
        self, node: fx.Node, rule: OpRule, wanted: Callable[[Atom], bool], partition: Callable[[Atom], Partition]
    ) -> list[Sharded]:
        found = []
        resized = {name for _, _, name in rule.resize}
        for factor in rule.sizes:
            if factor in rule.replicated and factor not in rule.self_reduced:
                continue
            atoms = self.axes.factor(node, factor)
            for at, atom in enumerate(atoms):
                if not wanted(atom) or (factor in resized and at > 0):
                    continue
                after = prod(a.size for a in atoms[at + 1 :])
                outer = prod(a.size for a in atoms[:at])
                decision = Sharded(factor, partition(atom).refine(after), outer)
                if decision.is_allowed(rule):
                    found.append(decision)
        return found

    def _reads_all_of_it(self, node: fx.Node, rule: OpRule, decision: Sharded) -> bool:
        """Whether ops like this one, of which each gives a pending sum, read their operand entry by entry.

        One gather for all of them is then less than their sums: a loop over the steps of a sequence.
        """
        if decision.factor not in rule.reduce or rule.heavy or len(rule.operands) != 1:
            return False
        (producer,) = dataflow.operands(node)
        alike = [user for user in producer.users if user.target == node.target]
        total = sum(prod(dataflow.shape(user)) for user in alike)
        return len(alike) > 1 and order(total) >= order(prod(dataflow.shape(producer)))

    def _preference(self, node: fx.Node, rule: OpRule, decision: Sharded) -> tuple[bool, int]:
        kept = any(decision.factor in factors for dims in rule.results for factors in dims)
        asked = decision.demands(rule, len(rule.operands))
        actual = [notes.placement(producer) for producer in dataflow.operands(node)]
        return kept, sum(a == d for a, d in zip(actual, asked, strict=True) if isinstance(d, Shard))

    def demanded(self, node: fx.Node) -> list[Placement]:
        """Placements that the consumers of a node's output demand; the graph's output demands I."""
        return [I if placement is None else placement for placement in demanded(node)]

    def _backward(self, node: fx.Node) -> Decision:
        rule = notes.note(node).rule
        asked = set(self.demanded(node))
        if rule is not None and len(asked) == 1 and len(rule.results) == 1:
            (shard,) = asked
            if isinstance(shard, Shard):
                return decision_for(rule, rule.results[0], shard) or Replicate(I)
        return Replicate(I)

    def _gradient_is_pending(self, node: fx.Node) -> bool:
        note = notes.note(node)
        if note.decision is None or not note.decision.is_replicated or not note.differentiable:
            return False
        if note.rule is not None and note.rule.whole_gradient:
            return False
        asked = self.demanded(node)
        return bool(asked) and all(isinstance(a, Shard) or a == R for a in asked)


def light_nodes(graph: fx.Graph) -> frozenset[fx.Node]:
    """Nodes computed from placeholders and constants without heavy work: replicating them costs no communication.

    Nodes that read a sharded input (not a parameter) are not light: replicating them would communicate.
    """
    light: set[fx.Node] = set()
    for node in graph.nodes:
        note = notes.note(node)
        if node.op == "output" or (note.stored and not note.is_parameter):
            continue
        rule = note.rule
        heavy = rule is not None and rule.heavy
        if not heavy and all(source in light for source in node.all_input_nodes):
            light.add(node)
    return frozenset(light)
