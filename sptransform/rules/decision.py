"""How one node runs on one mesh dim. A decision states the placements it demands of operands, the placements of its
results, and whether the op's rule allows it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from sptransform.rules.rule import Dims, OpRule
from sptransform.sharding.partition import Partition
from sptransform.sharding.placement import I, P, Placement, R, Shard
from sptransform.sharding.sizes import Size, quotient


class Decision(ABC):
    """Base: how a node runs. An op without a rule (None) can only be replicated."""

    @abstractmethod
    def demand(self, rule: OpRule | None, index: int) -> Placement:
        """The placement in which the op reads its ``index``-th operand."""

    @abstractmethod
    def outcome(self, rule: OpRule | None, index: int) -> Placement:
        """The placement of the op's ``index``-th result."""

    @abstractmethod
    def is_allowed(self, rule: OpRule | None) -> bool:
        """Whether the op's rule allows this decision; without that, ranks would compute wrong values."""

    @property
    def is_replicated(self) -> bool:
        """Whether every rank computes the full result from full operands."""
        return False

    @property
    def is_cut(self) -> bool:
        """Whether each rank runs the op on a shard; the op may then need its local form."""
        return False

    def communicates(self, rule: OpRule) -> bool:
        """Whether the op itself communicates under this decision."""
        return False

    def partition_of(self, factor: str) -> Partition | None:
        """The partition of a factor; None if it is not cut."""
        return None

    def fits(self, rule: OpRule, num_ranks: int) -> bool:
        """Whether what is cut is a factor of the rule, of its size, and among so many ranks."""
        return True

    def demands(self, rule: OpRule | None, num_operands: int) -> tuple[Placement | None, ...]:
        """The placements of all operands; None for operands that are not read."""
        unread = frozenset() if rule is None else rule.unread
        return tuple(None if i in unread else self.demand(rule, i) for i in range(num_operands))

    def outcomes(self, rule: OpRule | None, num_results: int) -> tuple[Placement, ...]:
        """The placements of all results."""
        return tuple(self.outcome(rule, i) for i in range(num_results))


@dataclass(frozen=True)
class Replicate(Decision):
    """Every rank computes the full result; ``placement`` is I or R."""

    placement: Placement = I

    @property
    def is_replicated(self) -> bool:
        return True

    def demand(self, rule: OpRule | None, index: int) -> Placement:
        return self.placement

    def outcome(self, rule: OpRule | None, index: int) -> Placement:
        return self.placement

    def is_allowed(self, rule: OpRule | None) -> bool:
        return True


@dataclass(frozen=True)
class Pending(Decision):
    """The op is linear in ``operands``. These are pending sums, and so is the result."""

    operands: frozenset[int]

    def demand(self, rule: OpRule | None, index: int) -> Placement:
        return P if index in self.operands else R

    def outcome(self, rule: OpRule | None, index: int) -> Placement:
        return P

    def is_allowed(self, rule: OpRule | None) -> bool:
        return rule is not None and self.operands in rule.linear


class Cut(Decision):
    """Base: each rank computes its part of ``factor``, and of other factors that never share a tensor with it."""

    factor: str
    partition: Partition

    @abstractmethod
    def cuts(self) -> Iterator[Sharded]:
        """One decision per factor that is cut."""

    @property
    def is_cut(self) -> bool:
        return True

    def demand(self, rule: OpRule | None, index: int) -> Placement:
        return self.shard(rule, "operand", index) or R

    def outcome(self, rule: OpRule | None, index: int) -> Placement:
        if index in rule.own:
            return R
        # without the cut factor a result is a term of a sum, unless the op has summed over the ranks itself
        return self.shard(rule, "result", index) or (I if self.factor in rule.self_reduced else P)

    def shard(self, rule: OpRule, side: str, index: int) -> Shard | None:
        """The shard of one tensor; None if none of its factors is cut. ``side`` is "operand" or "result"."""
        key = (self, side, index)
        if key not in rule.placements:
            dims = (rule.operands if side == "operand" else rule.results)[index]
            shards = (_shard_of(rule, cut, side, index, dims) for cut in self.cuts())
            rule.placements[key] = next((shard for shard in shards if shard is not None), None)
        return rule.placements[key]

    def fits(self, rule: OpRule, num_ranks: int) -> bool:
        return all(
            cut.outer * cut.partition.size == rule.sizes.get(cut.factor) and cut.partition.num_ranks == num_ranks
            for cut in self.cuts()
        )

    def partition_of(self, factor: str) -> Partition | None:
        return next((cut.partition for cut in self.cuts() if cut.factor == factor), None)


@dataclass(frozen=True)
class Sharded(Cut):
    """Each rank computes its part of ``factor``, which is viewed as ``outer x partition.size``."""

    factor: str
    partition: Partition
    outer: Size = 1

    def cuts(self) -> Iterator[Sharded]:
        yield self

    def is_allowed(self, rule: OpRule | None) -> bool:
        if rule is None or (self.factor in rule.replicated and self.factor not in rule.self_reduced):
            return False
        if self.factor in rule.self_reduced & rule.ordered and not self.partition.is_in_order:
            return False
        shared = [dims for index, dims in enumerate(rule.results) if index not in rule.own]
        kept = all(any(self.factor in names for names in dims) for dims in shared)
        is_joined = self.factor in rule.reduce or self.factor in rule.self_reduced
        # what several ranks own would be counted by each
        return self.partition.is_exact if is_joined else kept

    def communicates(self, rule: OpRule) -> bool:
        return self.factor in rule.self_reduced


@dataclass(frozen=True)
class RingDecision(Cut):
    """Each rank computes its part of ``factor`` and holds one of ``ring_factor``, which the op sends around itself."""

    factor: str
    partition: Partition
    ring_factor: str
    key_partition: Partition

    def cuts(self) -> Iterator[Sharded]:
        yield Sharded(self.factor, self.partition)
        yield Sharded(self.ring_factor, self.key_partition)

    def is_allowed(self, rule: OpRule | None) -> bool:
        return rule is not None and self.ring_factor in rule.ring_factors and self.factor not in rule.replicated

    def communicates(self, rule: OpRule) -> bool:
        return True


def _shard_of(rule: OpRule, cut: Sharded, side: str, index: int, dims: Dims) -> Shard | None:
    for dim, factors in enumerate(dims):
        if cut.factor in factors:
            at = factors.index(cut.factor)
            before = prod(rule.sizes[f] for f in factors[:at])
            after = prod(rule.sizes[f] for f in factors[at + 1 :])
            resize = rule.resize.get((side, index, cut.factor))
            partition = resize.partition(cut.partition) if resize else cut.partition
            return Shard(dim, partition.refine(after), before * cut.outer)
    return None


def decision_for(rule: OpRule, dims: Dims, shard: Shard) -> Sharded | None:
    """The decision that gives a tensor with ``dims`` the placement ``shard``; None if no factor gives it."""
    factors = dims[shard.dim]
    for at, factor in enumerate(factors):
        before = prod(rule.sizes[f] for f in factors[:at])
        after = prod(rule.sizes[f] for f in factors[at + 1 :])
        outer = quotient(shard.outer, before)
        if factor in rule.replicated or outer is None:
            continue
        if shard.outer != before and any(name == factor for _, _, name in rule.resize):
            continue
        partition = shard.partition.coarsen(after) if after > 1 else shard.partition
        if partition is not None and outer * partition.size == rule.sizes[factor]:
            return Sharded(factor, partition, outer)
    return None
