"""Which strategies a number of ranks can be given to, and on which meshes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from sympy import divisors

from sptransform.engine.strategy import Strategy
from sptransform.strategies.composed import Composed
from sptransform.strategies.megatron import MegatronSP
from sptransform.strategies.names import StrategyLike, strategy_of
from sptransform.strategies.ring import AllGatherKV, Ring
from sptransform.strategies.ulysses import Ulysses
from sptransform.strategies.usp import USP

#: what splits the sequence alone, and what also cuts weights
OF_SEQUENCES: tuple[Strategy, ...] = (Ulysses(), Ring(), AllGatherKV(), USP())
OF_WEIGHTS: tuple[Strategy, ...] = (
    MegatronSP(),
    *(Composed((strategy, MegatronSP())) for strategy in (Ring(), Ulysses(), AllGatherKV())),
)


@dataclass(frozen=True)
class Candidate:
    """A strategy on a mesh of ``shape``; ``name`` is short: "ulysses", "usp 8 x 8", "ring 8 x megatron 8"."""

    name: str
    strategy: Strategy
    shape: tuple[int, ...]


def candidates(
    shape: tuple[int, ...], strategies: Sequence[StrategyLike] = (*OF_SEQUENCES, *OF_WEIGHTS)
) -> list[Candidate]:
    """Every strategy on the meshes that it takes.

    Of a mesh of one dim, whose ranks may be viewed as two dims, a pair of strategies gets every ``outer x inner`` with
    both more than one, and USP every ``ulysses x ring``. Of a mesh of two dims, these get that shape, and strategies of
    one dim are left out. A strategy that occurs twice is listed once.

    Raises:
        UsageError: something in ``strategies`` is no strategy.
    """
    found = [candidate for given in strategies for candidate in _of(strategy_of(given), shape)]
    return list({(candidate.strategy, candidate.shape): candidate for candidate in found}.values())


def grid_of(candidate: Candidate) -> tuple[int, ...]:
    """The ranks of each mesh dim that its graph is cut over: of a USP on a mesh of one dim, of its ring first."""
    shapes = candidate.strategy.mesh_shapes(prod(candidate.shape), candidate.shape)
    return shapes[0] if len(shapes) == 1 else candidate.shape


def with_outer(candidate: Candidate, outer: int) -> Candidate:
    """The candidate with so many ranks on the outer mesh dim, and as many as before on the inner one."""
    inner = grid_of(candidate)[1:]
    strategy = candidate.strategy
    if isinstance(strategy, USP) and inner:
        strategy = replace(strategy, ring=outer)
    grid = (outer, *inner)
    shape = grid if len(candidate.shape) == len(grid) else (prod(grid),)
    name = _pair(strategy, grid) if isinstance(strategy, Composed) else name_of(strategy)
    return Candidate(name, strategy, shape)


def _of(strategy: Strategy, shape: tuple[int, ...]) -> list[Candidate]:
    num_ranks = prod(shape)
    grids = [shape] if len(shape) == 2 else [(num_ranks // n, n) for n in divisors(num_ranks)[1:-1]]
    if isinstance(strategy, Composed):
        return [Candidate(_pair(strategy, grid), strategy, grid) for grid in grids]
    if isinstance(strategy, USP) and None in (strategy.ulysses, strategy.ring):
        fitting = [(r, u) for r, u in grids if strategy.ulysses in (None, u) and strategy.ring in (None, r)]
        fixed = [replace(strategy, ulysses=u, ring=r) for r, u in fitting]
        return [Candidate(name_of(each), each, shape) for each in fixed]
    if len(shape) > strategy.max_mesh_dims:
        return []
    return [Candidate(name_of(strategy), strategy, shape)]


def _pair(strategy: Composed, grid: tuple[int, ...]) -> str:
    return " x ".join(f"{name_of(each)} {size}" for each, size in zip(strategy.strategies, grid, strict=True))


def name_of(strategy: Strategy) -> str:
    """The name by which users know it; of options that are not the default, all."""
    if isinstance(strategy, USP) and strategy.ulysses and strategy.ring:
        degrees = f"usp {strategy.ulysses} x {strategy.ring}"
        plain = replace(strategy, ulysses=None, ring=None)
        return degrees if plain == USP() else f"{degrees} of {plain}"
    for name, known in _NAMES.items():
        if strategy == known:
            return name
    return str(strategy)


# as users pass them
_NAMES = {"ulysses": Ulysses(), "ring": Ring(), "allgather": AllGatherKV(), "usp": USP(), "megatron": MegatronSP()}
