"""The names of strategies, as users pass them."""

from __future__ import annotations

from collections.abc import Sequence
from pkgutil import resolve_name

from sptransform.diagnostics.errors import UsageError, describe
from sptransform.engine.strategy import Strategy
from sptransform.strategies.composed import Composed
from sptransform.strategies.megatron import MegatronSP
from sptransform.strategies.ring import AllGatherKV, Ring
from sptransform.strategies.ulysses import Ulysses
from sptransform.strategies.usp import USP

StrategyLike = str | Strategy | Sequence["str | Strategy"]

_NAMED = {"allgather": AllGatherKV, "megatron": MegatronSP, "ring": Ring, "ulysses": Ulysses, "usp": USP}
# A name of what stands above the compiler, because it compiles every other strategy to choose among them. As an entry
# point is, it is found when it is asked for.
_CHOOSING = {"auto": "sptransform.planning.auto:Auto"}


def strategy_of(strategy: StrategyLike) -> Strategy:
    """The strategy for a name or an object; for a list with one strategy per mesh dim, their composition.

    Raises:
        UsageError: anything else.
    """
    if isinstance(strategy, Strategy):
        own = type(strategy)
        if not own.chooses and (own.place_attention, own.stages) == (Strategy.place_attention, Strategy.stages):
            fix = "def place_attention(self, rule, num_ranks, divide): .."
            raise UsageError(describe(f"{strategy} places nothing", found="no method place_attention", fix=fix))
        return strategy
    if isinstance(strategy, type) and issubclass(strategy, Strategy):
        what = "a strategy is an object of a subclass of Strategy"
        raise UsageError(describe(what, found=f"the class {strategy.__name__}", fix=f"{strategy.__name__}(..)"))
    if isinstance(strategy, list | tuple) and len(strategy) == 1:
        return strategy_of(strategy[0])
    if isinstance(strategy, list | tuple):
        return Composed(tuple(map(strategy_of, strategy)))
    if isinstance(strategy, str) and strategy in _NAMED:
        return _NAMED[strategy]()
    if isinstance(strategy, str) and strategy in _CHOOSING:
        return resolve_name(_CHOOSING[strategy])()
    raise UsageError(
        describe(
            "unknown strategy",
            found=repr(strategy),
            fix=f"one of {', '.join(map(repr, sorted(_NAMED | _CHOOSING)))}, or a Strategy object",
        )
    )
