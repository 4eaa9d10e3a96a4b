"""The names of strategies, as users pass them."""

from __future__ import annotations

from collections.abc import Sequence

from sptransform.diagnostics.errors import UsageError, describe
from sptransform.engine.strategy import Strategy
from sptransform.strategies.composed import Composed
from sptransform.strategies.megatron import MegatronSP
from sptransform.strategies.ring import AllGatherKV, Ring
from sptransform.strategies.ulysses import Ulysses
from sptransform.strategies.usp import USP

StrategyLike = str | Strategy | Sequence["str | Strategy"]

_NAMED = {"allgather": AllGatherKV, "megatron": MegatronSP, "ring": Ring, "ulysses": Ulysses, "usp": USP}
_PLANNED = ("auto",)


def strategy_of(strategy: StrategyLike) -> Strategy:
    """The strategy for a name or an object; for a list with one strategy per mesh dim, their composition.

    Raises:
        UsageError: anything else.
    """
    if isinstance(strategy, Strategy):
        return strategy
    if isinstance(strategy, list | tuple) and len(strategy) == 1:
        return strategy_of(strategy[0])
    if isinstance(strategy, list | tuple):
        return Composed(tuple(map(strategy_of, strategy)))
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
