"""What each strategy asks of attention; frozen dataclasses, validated when made. Propagation does the rest."""

from __future__ import annotations

from dataclasses import dataclass

from sptransform.errors import UsageError, describe
from sptransform.partition import Partition
from sptransform.rules import OpRule, Sharded


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
        split: what the all-to-all divides; "heads".
    """

    split: str = "heads"

    def __post_init__(self) -> None:
        if self.split != "heads":
            raise UsageError(describe("unknown split of Ulysses", found=f"split={self.split!r}", fix="split='heads'"))

    def place_attention(self, rule: OpRule, num_ranks: int) -> Sharded:
        factor = rule.roles.get("heads")
        num_heads = rule.sizes[factor] if factor else 1
        if factor is None or num_heads < num_ranks:
            raise UsageError(
                describe(
                    "Ulysses needs at least as many attention heads as ranks",
                    found=f"{num_heads} heads, {num_ranks} ranks",
                    fix="use fewer ranks in this mesh dim",
                )
            )
        return Sharded(factor, Partition.balanced(num_heads, num_ranks))


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
