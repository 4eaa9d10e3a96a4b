"""Megatron-LM's tensor parallelism with sequence parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sptransform.diagnostics.errors import UsageError, describe
from sptransform.engine.strategy import Divide, Strategy, check_choice
from sptransform.rules.decision import Sharded
from sptransform.rules.rule import OpRule


@dataclass(frozen=True)
class MegatronSP(Strategy):
    """Linears are sharded along their inner axes, everything between them along the sequence.

    Tensor parallelism with sequence parallelism of Megatron-LM (Korthikanti et al., arXiv 2205.05198, §4.2): an
    all-gather before a column-parallel linear, a reduce-scatter after a row-parallel one, and their transposes. Inner
    axes are those that one linear makes and another contracts (heads, through attention; the hidden units of an MLP),
    and the vocabulary. They are found without names: see :mod:`sptransform.engine.inner_axes`.

    Args:
        regather: save only the local shard of what was gathered for a linear and gather it again in the backward
            (§4.2.2), instead of saving the full tensor.

    Raises:
        UsageError: an invalid ``regather``; at compile time, attention with one head.
    """

    regather: bool = True  # type: ignore[misc]
    shards_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice(self, "regather", False, True)

    def place_attention(self, rule: OpRule, num_ranks: int, divide: Divide) -> Sharded:
        heads = rule.roles.get("heads")
        if heads is None:
            raise UsageError(
                describe(
                    "MegatronSP has nothing to split",
                    found="an attention of one head",
                    fix="a strategy that splits the sequence in attention: 'ring' or 'allgather'",
                )
            )
        return Sharded(heads, divide(heads))
