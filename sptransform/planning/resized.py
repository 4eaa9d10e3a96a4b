"""Formulas for the options of a comparison: the same strategies at other lengths and on fewer ranks, counted too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from sptransform.cost.formulas import B, N, Point, S, formulas_of, polynomials
from sptransform.cost.records import Step
from sptransform.diagnostics.errors import UsageError, describe
from sptransform.engine.strategy import Strategy
from sptransform.graph import notes
from sptransform.planning.compare import compare
from sptransform.planning.records import ComparisonFacts, Option

#: (tokens, rows) -> inputs of the model
Resized = Callable[[int, int], Mapping[str, Any] | tuple[Any, ...]]

LENGTHS = polynomials({S: 1, B: 1})


def with_formulas(facts: ComparisonFacts, model: nn.Module, resized: Resized, **options: Any) -> tuple[Option, ...]:
    """The options of ``facts``, those on a mesh of one dim with formulas of bytes and messages in S, B and N.

    The model is captured five times more, at half the tokens, twice the rows, and on a half and a quarter of the ranks.
    A strategy that has other degrees on other numbers of ranks, as USP has, gets none.

    Args:
        facts: what :func:`compare` found.
        model: the same.
        resized: makes inputs of so many tokens and rows.
        options: further options of :func:`compare`.

    Raises:
        UsageError: nothing says how many tokens and rows there are, or they do not divide by enough.
    """
    if not callable(resized):
        fix = "lambda tokens, rows: {'input_ids': torch.zeros(rows, tokens, dtype=torch.long)}"
        raise UsageError(describe("resized is a function (tokens, rows) -> inputs", found=repr(resized), fix=fix))
    tokens, rows = sizes_of(facts.runnable)
    alike = [o for o in facts.runnable if o.strategy.max_mesh_dims == 1]
    steps: dict[Strategy, list[tuple[Point, Step]]] = {
        o.strategy: [({S: tokens, B: rows, N: facts.world_size}, o.step)] for o in alike if o.step is not None
    }
    for point in points(tokens, rows, facts.world_size):
        found = compare(model, resized(point[S], point[B]), world_size=point[N], strategies=list(steps), **options)
        if found.runnable and (sizes := sizes_of(found.runnable)) != (point[S], point[B]):
            asked = f"resized({point[S]}, {point[B]})"
            fix = "inputs of the tokens and rows that resized is called with"
            found_sizes = f"{asked} makes inputs of {sizes[0]} tokens, {sizes[1]} rows"
            raise UsageError(describe("resized makes inputs of another size", found=found_sizes, fix=fix))
        for option in found.runnable:
            steps[option.strategy].append((point, option.step))
    return tuple(replace(o, formulas=_formulas(steps.get(o.strategy, []))) for o in facts.options)


def _formulas(steps: Sequence[tuple[Point, Step]]) -> Mapping[str, Any]:
    ranks = sorted({point[N] for point, _ in steps})
    holds = f"on {', '.join(map(str, ranks))} ranks, for tokens that divide as those that were counted"
    return formulas_of(steps, LENGTHS, holds) if steps else {}


def points(tokens: int, rows: int, num_ranks: int) -> Iterator[Point]:
    """More than the terms of a formula, each symbol with several values."""
    if num_ranks % 4 or num_ranks < 8 or tokens % (4 * num_ranks):
        found = f"{num_ranks} ranks, {tokens} tokens"
        fix = "ranks that 4 divides, 8 or more, and tokens that four times the ranks divide"
        raise UsageError(describe("formulas are counted on half and a quarter of the ranks", found=found, fix=fix))
    half = tokens // 2
    yield from ({S: half, B: rows, N: num_ranks}, {S: tokens, B: 2 * rows, N: num_ranks})
    yield {S: half, B: 2 * rows, N: num_ranks}
    yield from ({S: half, B: rows, N: num_ranks // 2}, {S: half, B: rows, N: num_ranks // 4})


def sizes_of(options: Sequence[Option]) -> tuple[int, int]:
    """Tokens and rows of the first attention. Raises UsageError where there is none, or its sizes are open."""
    for option in options:
        for node in option.explanation.rewritten.graph_module.graph.nodes if option.explanation else ():
            for rule, _ in notes.decided(node)[:1]:
                found = tuple(rule.sizes.get(rule.roles.get(role), 1) for role in ("queries", "batch"))
                if all(isinstance(size, int) for size in found):
                    return found
    raise UsageError(
        describe("formulas are in the tokens and rows of an attention", found="no attention", fix="resized=None")
    )
