"""Strategies in which each rank computes the attention of its own queries: Ring and AllGatherKV."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from sptransform.diagnostics.errors import UsageError, describe
from sptransform.engine.strategy import Divide, Strategy, check_choice
from sptransform.rules.decision import Decision, RingDecision, Sharded
from sptransform.rules.rule import OpRule
from sptransform.sharding.partition import BLOCKS_PER_RANK, Partition
from sptransform.sharding.sizes import Size


@dataclass(frozen=True)
class _QueriesStay(Strategy):
    """Base: each rank computes the attention of its own queries.

    Args:
        layout: as in :class:`Ring`.
        block: as in :class:`Ring`.
    """

    layout: str = "zigzag"
    block: int | None = field(default=None, kw_only=True)
    reads_masks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_layout(self)

    def partition(self, size: Size, num_ranks: int, is_causal: bool) -> Partition:
        if self.layout == "striped":
            return Partition.striped(size, num_ranks, self.block)
        if is_causal and self.layout == "zigzag":
            return Partition.zigzag(size, num_ranks)
        return Partition.contiguous(size, num_ranks)

    def multiple(self, num_ranks: int) -> int | None:
        if self.layout == "striped":
            return BLOCKS_PER_RANK * num_ranks if self.block is None else None
        return 2 * num_ranks if self.layout == "zigzag" else num_ranks


def check_layout(strategy: Strategy) -> None:
    """Check the ``layout`` and ``block`` of a strategy. Raises UsageError."""
    check_choice(strategy, "layout", "contiguous", "striped", "zigzag")
    block = strategy.block
    if block is not None and (not isinstance(block, int) or isinstance(block, bool) or block < 1):
        raise UsageError(
            describe(
                f"block of {type(strategy).__name__} is a number of tokens",
                found=f"block={block!r}",
                fix=f"1 or more, such as 128; None for {BLOCKS_PER_RANK} blocks a rank",
            )
        )
    if block is not None and strategy.layout != "striped":
        raise UsageError(
            describe(
                f"only the striped layout of {type(strategy).__name__} has blocks of a given size",
                found=f"layout={strategy.layout!r}, block={block}",
                fix=f"layout='striped', block={block}, or no block",
            )
        )


@dataclass(frozen=True)
class Ring(_QueriesStay):
    """Queries stay, keys and values circulate among the ranks (Liu et al., Ring Attention, arXiv 2310.01889).

    Works for any number of ranks, heads and tokens. Each hop overlaps with the computation of the previous block. What
    is saved for the backward does not grow with the number of ranks; the backward runs its own ring.

    Args:
        layout: "zigzag" gives each rank one block from the front and one from the back of the sequence, so that a
            causal mask leaves all ranks equal work (Llama 3, arXiv 2407.21783, §3.3.2); a model without causal
            attention then uses "contiguous". "striped" deals many blocks round the ranks, whether attention is causal
            or not, which leaves them equal work in packed documents too.
        block: the number of tokens of a striped block; each length is then compiled for itself. By default each rank
            gets 32 blocks, however long. A causal document of L tokens adds at most about (N-1) * block / L to the work
            of the busiest of N ranks over the mean, so shorter documents want smaller blocks; kernels want 128 or more.
        kv: how keys and values reach the queries: on the "ring", or by an "allgather" as in :class:`AllGatherKV`.

    Raises:
        UsageError: an invalid ``layout``, ``block`` or ``kv``.
    """

    kv: str = "ring"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "kv", "allgather", "ring")

    def place_attention(self, rule: OpRule, num_ranks: int, divide: Divide) -> Decision:
        queries, keys = rule.roles["queries"], rule.roles.get("keys")
        if self.kv == "allgather" or keys not in rule.ring_factors:
            return Sharded(queries, divide(queries))
        return RingDecision(queries, divide(queries), keys, divide(keys))


@dataclass(frozen=True)
class AllGatherKV(_QueriesStay):
    """Queries stay, keys and values are gathered (Llama 3 context parallelism, arXiv 2407.21783, §3.3.2).

    One all-gather in the forward, one reduce-scatter of their gradients in the backward: fewer messages than a ring and
    as many bytes, at the cost of memory for all keys and values of a layer.

    Args:
        layout: as in :class:`Ring`.
        block: as in :class:`Ring`.
        regather: gather keys and values again in the backward instead of saving them.

    Raises:
        UsageError: an invalid ``layout``, ``block`` or ``regather``.
    """

    regather: bool = False  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "regather", False, True)

    def place_attention(self, rule: OpRule, num_ranks: int, divide: Divide) -> Decision:
        queries = rule.roles["queries"]
        return Sharded(queries, divide(queries))
