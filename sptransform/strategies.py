"""What each strategy asks of attention; frozen dataclasses, validated when made. Propagation does the rest."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from sptransform.decisions import Sharded
from sptransform.errors import UsageError, describe
from sptransform.partition import Partition
from sptransform.rules import OpRule

log = logging.getLogger(__name__)


class Strategy:
    """Base: where attention runs, on one mesh dim."""

    def place_attention(self, rule: OpRule, num_ranks: int) -> Sharded:
        """How an attention op with ``rule`` is cut. Raises UsageError where the strategy cannot cut it."""
        raise NotImplementedError


@dataclass(frozen=True)
class Ulysses(Strategy):
    """Attention sees the whole sequence of some heads (Jacobs et al., DeepSpeed-Ulysses, arXiv 2309.14509, §3).

    One all-to-all brings queries, keys and values from sequence to head shards, one brings the output back. Key
    heads are moved as they are, not repeated to the number of query heads.

    Args:
        split: what the all-to-all divides among the ranks: "heads", or the "batch" where heads are fewer than ranks or
            do not divide evenly. Uneven numbers are exact; a rank without a share waits for the others.

    Raises:
        UsageError: another ``split``; at compile time, ``split="batch"`` for a batch of one.
    """

    split: str = "heads"

    def __post_init__(self) -> None:
        if self.split not in ("batch", "heads"):
            raise UsageError(
                describe("unknown split of Ulysses", found=f"split={self.split!r}", fix="'heads' or 'batch'")
            )

    def place_attention(self, rule: OpRule, num_ranks: int) -> Sharded:
        factor = rule.roles.get(self.split)
        if factor is None:
            raise UsageError(
                describe(
                    f"Ulysses(split={self.split!r}) has nothing to split",
                    found=f"an attention of one {'head' if self.split == 'heads' else 'sequence'}",
                    fix="Ulysses(split='heads')" if self.split == "batch" else "Ulysses(split='batch')",
                )
            )
        size = rule.sizes[factor]
        if size < num_ranks:
            log.warning("%d of %d ranks have no %s in attention", num_ranks - size, num_ranks, self.split)
        return Sharded(factor, Partition.balanced(size, num_ranks))


_NAMED = {"ulysses": Ulysses}
_PLANNED = ("allgather", "auto", "megatron", "ring", "usp")


def strategy_of(strategy: str | Strategy) -> Strategy:
    """The strategy meant by a name or given as an object. Raises UsageError for anything else."""
    if isinstance(strategy, Strategy):
        return strategy
    if isinstance(strategy, str) and strategy in _NAMED:
        return _NAMED[strategy]()
    planned = isinstance(strategy, str) and strategy in _PLANNED
    raise UsageError(
        describe(
            "this strategy is not built yet" if planned else "unknown strategy",
            found=repr(strategy),
            fix=f"one of {', '.join(map(repr, sorted(_NAMED)))}, or a Strategy object",
        )
    )
