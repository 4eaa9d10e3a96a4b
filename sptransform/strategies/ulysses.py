"""DeepSpeed-Ulysses: each rank computes attention for some heads over the full sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sptransform.diagnostics.errors import UsageError, describe
from sptransform.diagnostics.said_once import OnceLogger
from sptransform.engine.strategy import Divide, Strategy, check_choice, of_own_queries
from sptransform.rules.decision import Sharded
from sptransform.rules.rule import OpRule
from sptransform.sharding.partition import Partition

log = OnceLogger(__name__)


@dataclass(frozen=True)
class Ulysses(Strategy):
    """A rank computes some heads over the full sequence (Jacobs et al., DeepSpeed-Ulysses, arXiv 2309.14509, §3).

    One all-to-all turns sequence shards of queries, keys and values into head shards, another one brings the output
    back. Key heads are sent as they are, not repeated to the number of query heads.

    Args:
        split: what the all-to-all divides among the ranks: "heads", or the "batch" if heads are fewer than ranks or
            do not divide evenly. Uneven shares are exact; a rank without a share waits for the others. Attention of one
            head, with no causal mask, has its queries divided instead, and its keys gathered.

    Raises:
        UsageError: an invalid ``split``; at compile time, ``split="batch"`` for a batch of one.
    """

    split: str = "heads"

    def __post_init__(self) -> None:
        check_choice(self, "split", "batch", "heads")

    def place_attention(self, rule: OpRule, num_ranks: int, divide: Divide) -> Sharded:
        factor = rule.roles.get(self.split)
        if factor is None and self.split == "heads" and (found := of_own_queries(rule, divide)) is not None:
            return found
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

    def around(self, num_ranks: int, num_inside: int, heads: Sequence[tuple[int, int]]) -> Strategy:
        if self.split != "heads":
            return self
        ranks = num_ranks * num_inside
        uneven = [f"{h} query heads, {k} key heads" for h, k in heads if h % ranks or k % ranks]
        if uneven:
            raise UsageError(
                describe(
                    "Ulysses and tensor parallelism share the heads, and these are no multiple of the ranks",
                    found=f"{uneven[0]}, {num_ranks} x {num_inside} ranks",
                    fix="('ring', 'megatron') or ('allgather', 'megatron'), which share the heads over the second dim "
                    "only",
                )
            )
        return _UlyssesOutside(num_inside=num_inside)


@dataclass(frozen=True)
class _UlyssesOutside(Ulysses):
    """Ulysses over heads that ``num_inside`` inner ranks divide further.

    The heads consist of one block per inner rank, and the outer ranks divide each block. So the inner ranks can cut
    weights in contiguous blocks.
    """

    num_inside: int = 1

    def place_attention(self, rule: OpRule, num_ranks: int, divide: Divide) -> Sharded:
        decision = super().place_attention(rule, num_ranks, divide)
        block = decision.partition.size // self.num_inside
        return Sharded(decision.factor, Partition.blocks(block, num_ranks).tiled(self.num_inside))
