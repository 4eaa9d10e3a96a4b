"""Megatron-LM's tensor parallelism with sequence parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from sptransform.diagnostics.errors import UsageError, describe
from sptransform.engine.axes import Axes
from sptransform.engine.inner_axes import InnerAxes
from sptransform.engine.strategy import Divide, Strategy, check_choice, of_own_queries
from sptransform.rules.decision import Sharded
from sptransform.rules.rule import OpRule
from sptransform.sharding.placement import Placement, Shard
from sptransform.sharding.sizes import Size


@dataclass(frozen=True)
class MegatronSP(Strategy):
    """Linears are sharded along their inner axes, everything between them along the sequence.

    Tensor parallelism with sequence parallelism of Megatron-LM (Korthikanti et al., arXiv 2205.05198, §4.2): an
    all-gather before a column-parallel linear, a reduce-scatter after a row-parallel one, and their transposes. Inner
    axes are those that one linear makes and another contracts (heads, through attention; the hidden units of an MLP),
    and the vocabulary. They are found without names: see :mod:`sptransform.engine.inner_axes`. Attention of one head,
    with no causal mask, has its queries divided, and its keys gathered.

    Args:
        regather: save only the local shard of what was gathered for a linear and gather it again in the backward
            (§4.2.2), instead of saving the full tensor.

    Raises:
        UsageError: an invalid ``regather``; at compile time, causal attention with one head.
    """

    regather: bool = True  # type: ignore[misc]
    shards_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice(self, "regather", False, True)

    def gathers_for(self, rule: OpRule) -> bool:
        return super().gathers_for(rule) or rule.heavy

    def inner_axes(self, graph: fx.Graph, axes: Axes, num_ranks: int, light: frozenset[fx.Node]) -> InnerAxes:
        return InnerAxes(graph, axes, num_ranks, light)

    def stored_dim(
        self, shape: Sequence[Size], demanded: Sequence[Placement], num_ranks: int, is_stored: bool
    ) -> int | None:
        """As the graph reads it, if it is read in one way that DTensor can express."""
        dims = {x.dim if isinstance(x, Shard) and x.partition.is_exact else None for x in demanded}
        return dims.pop() if len(dims) == 1 else None

    def place_attention(self, rule: OpRule, num_ranks: int, divide: Divide) -> Sharded:
        heads = rule.roles.get("heads")
        if heads is None and (found := of_own_queries(rule, divide)) is not None:
            return found
        if heads is None:
            raise UsageError(
                describe(
                    "MegatronSP has nothing to split",
                    found="an attention of one head",
                    fix="a strategy that splits the sequence in attention: 'ring' or 'allgather'",
                )
            )
        return Sharded(heads, divide(heads))
