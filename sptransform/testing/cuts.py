"""All the ways in which a rule is tried: which factors are cut, and how ranks share them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from sptransform.rules.decision import RingDecision, Sharded
from sptransform.rules.rule import OpRule
from sptransform.sharding.partition import Partition


def present_factors(rule: OpRule) -> list[str]:
    """The factors that some dimension has: only those can be sharded."""
    return list(dict.fromkeys(f for _, _, dims in rule.tensors() for factors in dims for f in factors))


def partitions(size: int, num_ranks: int) -> Iterator[Partition]:
    """Ways to own an axis: blocks, balanced blocks, two intervals a rank, and one rank that owns nothing."""
    found = [
        Partition.contiguous(size, num_ranks),
        Partition.balanced(size, num_ranks),
        zigzag(size, num_ranks),
        Partition.of(size, [[], *([own] for own in _edges(size, num_ranks - 1))]),
    ]
    yield from dict.fromkeys(found)


def zigzag(size: int, num_ranks: int) -> Partition:
    """Rank r owns the r-th and the r-th last of ``2 num_ranks`` blocks."""
    blocks = _edges(size, 2 * num_ranks)
    return Partition.of(size, ([blocks[r], blocks[-1 - r]] for r in range(num_ranks)))


def _edges(size: int, num: int) -> list[tuple[int, int]]:
    return list(pairwise(size * r // num for r in range(num + 1)))


def decisions(rule: OpRule, factor: str, num_ranks: int) -> Iterator[Sharded | RingDecision]:
    """Every way to cut ``factor``; as an inner part of it too, unless its extent varies between tensors.

    Of queries whose positions the op is told, not that; but those with keys that circle, cut alike and otherwise.
    """
    size = rule.sizes[factor]
    circling = rule.ring_factors if factor == rule.roles.get("queries") else ()
    for partition in partitions(size, num_ranks):
        yield Sharded(factor, partition)
    if size % 2 == 0 and size > 2 and not circling and all(name != factor for _, _, name in rule.resize):
        for partition in partitions(size // 2, num_ranks):
            yield Sharded(factor, partition, outer=2)
    for other in circling:
        queries, keys = (list(partitions(rule.sizes[f], num_ranks)) for f in (factor, other))
        for at in range(max(len(queries), len(keys))):
            for shift in (0, 1):
                yield RingDecision(factor, queries[at % len(queries)], other, keys[(at + shift) % len(keys)])
