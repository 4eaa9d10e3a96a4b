"""What one node does on one mesh dim, and what that asks of its operands and gives to its results."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from sptransform.rules.rule import Dims, OpRule
from sptransform.sharding.partition import Partition
from sptransform.sharding.placement import I, P, Placement, R, Shard
from sptransform.sharding.sizes import Size, quotient


@dataclass(frozen=True)
class Decision:
    """Base: how a node runs."""


@dataclass(frozen=True)
class Sharded(Decision):
    """Each rank computes its part of ``factor``, itself seen as ``outer x partition.size``."""

    factor: str
    partition: Partition
    outer: Size = 1


@dataclass(frozen=True)
class Circular(Decision):
    """Each rank computes its part of ``factor``, and holds one of ``circling``, which the op passes round itself."""

    factor: str
    partition: Partition
    circling: str
    parts: Partition


@dataclass(frozen=True)
class Replicate(Decision):
    """Every rank computes the whole; ``placement`` is I or R."""

    placement: Placement = I


@dataclass(frozen=True)
class Pending(Decision):
    """The op is linear in ``operands``, which are pending sums, and so is its result."""

    operands: frozenset[int]


def placement_of(rule: OpRule, decision: Sharded | Circular, side: str, index: int, dims: Dims) -> Shard | None:
    """Where ``decision`` cuts one tensor; None where the tensor does not have the factor."""
    key = (decision, side, index)
    if key not in rule.placements:
        if isinstance(decision, Circular):
            cuts = [Sharded(decision.factor, decision.partition), Sharded(decision.circling, decision.parts)]
            found = [placement_of(rule, cut, side, index, dims) for cut in cuts]
            rule.placements[key] = found[0] or found[1]
        else:
            rule.placements[key] = _placement_of(rule, decision, side, index, dims)
    return rule.placements[key]


def _placement_of(rule: OpRule, decision: Sharded, side: str, index: int, dims: Dims) -> Shard | None:
    for dim, factors in enumerate(dims):
        if decision.factor in factors:
            at = factors.index(decision.factor)
            before = prod(rule.sizes[f] for f in factors[:at])
            after = prod(rule.sizes[f] for f in factors[at + 1 :])
            resize = rule.resize.get((side, index, decision.factor))
            partition = resize.partition(decision.partition) if resize else decision.partition
            return Shard(dim, partition.refine(after), before * decision.outer)
    return None


def demands(rule: OpRule | None, decision: Decision, num_operands: int) -> tuple[Placement | None, ...]:
    """Placements a node asks of its operands; None of those it does not read."""
    if isinstance(decision, Replicate):
        asked = [decision.placement] * num_operands
    elif isinstance(decision, Pending):
        asked = [P if i in decision.operands else R for i in range(num_operands)]
    else:
        assert rule is not None and isinstance(decision, Sharded | Circular)
        asked = [placement_of(rule, decision, "operand", i, dims) or R for i, dims in enumerate(rule.operands)]
    return tuple(None if rule is not None and i in rule.unread else placement for i, placement in enumerate(asked))


def outcomes(rule: OpRule | None, decision: Decision, num_results: int) -> tuple[Placement, ...]:
    """Placements of a node's results."""
    if isinstance(decision, Replicate):
        return (decision.placement,) * num_results
    if isinstance(decision, Pending):
        return (P,) * num_results
    assert rule is not None and isinstance(decision, Sharded | Circular)
    return tuple(
        R if i in rule.own else placement_of(rule, decision, "result", i, dims) or P
        for i, dims in enumerate(rule.results)
    )


def decision_for(rule: OpRule, dims: Dims, shard: Shard) -> Sharded | None:
    """The decision that gives a tensor with ``dims`` the placement ``shard``; None where no factor does."""
    factors = dims[shard.dim]
    for at, factor in enumerate(factors):
        before = prod(rule.sizes[f] for f in factors[:at])
        after = prod(rule.sizes[f] for f in factors[at + 1 :])
        outer = quotient(shard.outer, before)
        if factor in rule.whole or outer is None:
            continue
        if shard.outer != before and any(name == factor for _, _, name in rule.resize):
            continue
        partition = shard.partition.coarsen(after) if after > 1 else shard.partition
        if partition is not None and outer * partition.size == rule.sizes[factor]:
            return Sharded(factor, partition, outer)
    return None
