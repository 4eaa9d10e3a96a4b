"""Formulas for the options of a comparison: the same strategies at other lengths and on fewer ranks, counted too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from math import gcd, prod
from typing import Any

import sympy
from torch import nn

from sptransform.compiler.options import Options
from sptransform.cost.folding import LayerRun
from sptransform.cost.formulas import B, Formula, N, Point, Ranks, S, formulas_of, polynomials
from sptransform.cost.hardware import Hardware
from sptransform.cost.records import Step
from sptransform.cost.time_formulas import StepTimes, parts_of
from sptransform.diagnostics.errors import UsageError, describe
from sptransform.graph import notes
from sptransform.planning.candidates import Candidate, grid_of, with_outer
from sptransform.planning.compare import Progress, while_tried
from sptransform.planning.judged import Trial, judged
from sptransform.planning.records import ComparisonFacts, Option

#: (tokens, rows) -> inputs of the model
Resized = Callable[[int, int], Mapping[str, Any] | tuple[Any, ...]]
Counted = Sequence[tuple[Point, Step]]

#: what is sent, read and written grows with tokens and rows
LENGTHS = polynomials({S: 1, B: 1})
#: FLOPs are of products of every token with weights, and of every two tokens; few terms first
WORK = ([S * B, S**2 * B], [S, S * B, S**2 * B], polynomials({S: 2, B: 1}))


def with_formulas(
    facts: ComparisonFacts,
    model: nn.Module,
    resized: Resized,
    *,
    hardware: Hardware | None = None,
    progress: Progress = lambda name, done, of: None,
    **options: Any,
) -> tuple[Option, ...]:
    """The options of ``facts`` with formulas of bytes, messages, FLOPs, memory traffic and time in S, B and N.

    The model is captured at other sizes too, and every strategy is counted there and on other numbers of ranks. On a
    mesh of two dims, N changes the outer one: a ring keeps the Ulysses or tensor parallelism inside of it.

    Args:
        facts: what :func:`compare` found.
        model: the same.
        resized: makes inputs of so many tokens and rows.
        hardware: what times are simulated for.
        progress: as for :func:`compare`.
        options: further options of :func:`compare`.

    Raises:
        UsageError: nothing says how many tokens and rows there are, or they do not divide by enough.
    """
    if not callable(resized):
        fix = "lambda tokens, rows: {'input_ids': torch.zeros(rows, tokens, dtype=torch.long)}"
        raise UsageError(describe("resized is a function (tokens, rows) -> inputs", found=repr(resized), fix=fix))
    tokens, rows = sizes_of(facts.runnable)
    runnable = [Candidate(option.name, option.strategy, option.mesh) for option in facts.runnable]
    wanted = {candidate: outer_sizes(grid_of(candidate)[0]) for candidate in runnable}
    check_divisible(tokens, max(prod(grid_of(with_outer(c, max(sizes)))) for c, sizes in wanted.items()))
    first = {S: tokens, B: rows, N: facts.world_size}
    counted = {each: [(first, o.step)] for each, o in zip(runnable, facts.runnable, strict=True) if o.step is not None}
    chosen = Options.of({"outputs": "dtensor", **options})

    def count(trial: Trial, runs: Mapping[str, LayerRun], at: tuple[int, int], sizes: Sequence[int]) -> None:
        for candidate, outer in wanted.items():
            for number in sizes:
                scaled = with_outer(candidate, outer[number])
                option = judged(scaled, trial, None, runs)()
                if option.step is not None:
                    _check_sizes(option, *at)
                    point = {S: at[0], B: at[1], N: prod(scaled.shape)}
                    counted[candidate].append((point, option.step))

    for done, (times, sizes) in enumerate(PLACES.items()):
        at = int(tokens * times[0]), rows * times[1]
        progress(f"formulas: {at[0]:,} tokens, {at[1]} rows", done, len(PLACES))
        while_tried(model, resized(*at), chosen, partial(count, at=at, sizes=sizes))
    progress("formulas", len(PLACES), len(PLACES))
    own: dict[Candidate, dict[str, Any]] = {}
    for candidate, steps in counted.items():
        names = _names(candidate, wanted[candidate], steps)
        formulas, step_times = _formulas(candidate, names, steps), _times(names, steps, hardware)
        own[candidate] = {"formulas": formulas, "times": step_times}
    return tuple(replace(o, **own.get(Candidate(o.name, o.strategy, o.mesh), {})) for o in facts.options)


# (times the tokens, times the rows) -> which of the outer sizes are counted there, beside what was compared. More than
# the terms of a formula, and each symbol with several values at several values of the others
PLACES: Mapping[tuple[Fraction, int], Sequence[int]] = {
    (Fraction(1, 2), 2): (0, 1),  # first, for it shows at once whether both lengths are heeded
    (Fraction(1), 1): (1, 2),
    (Fraction(1, 2), 1): (0, 1, 2),
    (Fraction(1, 4), 1): (0, 1, 2),
    (Fraction(1), 2): (0, 1),
    (Fraction(1, 2), 3): (0,),
}


def outer_sizes(size: int) -> tuple[int, int, int]:
    """Three numbers of ranks of the outer mesh dim, ``size`` first: a half and a quarter of it where these are two."""
    halves = [size // times for times in (2, 4) if size % times == 0 and size // times > 1]
    found = [size, *halves, 2 * size, 4 * size][:3]
    return found[0], found[1], found[2]


def check_divisible(tokens: int, num_ranks: int) -> None:
    """Raises UsageError unless a quarter of the tokens divides by twice as many ranks, as zigzag layouts cut them."""
    if tokens % (8 * num_ranks):
        fix = f"tokens that {8 * num_ranks} divides"
        found = f"{tokens} tokens, up to {num_ranks} ranks"
        raise UsageError(describe("formulas are counted at a quarter of the tokens too", found=found, fix=fix))


def _check_sizes(option: Option, tokens: int, rows: int) -> None:
    if (sizes := sizes_of([option])) != (tokens, rows):
        asked = f"resized({tokens}, {rows})"
        fix = "inputs of the tokens and rows that resized is called with"
        found = f"{asked} makes inputs of {sizes[0]} tokens, {sizes[1]} rows"
        raise UsageError(describe("resized makes inputs of another size", found=found, fix=fix))


def _names(candidate: Candidate, outer: Sequence[int], steps: Counted) -> dict[int, str]:
    """The numbers of ranks that were counted -> the name of the candidate there."""
    named = {prod(grid_of(scaled)): scaled.name for scaled in (with_outer(candidate, size) for size in outer)}
    return {n: named[n] for n in sorted({int(point[N]) for point, _ in steps})}


def _formulas(candidate: Candidate, names: Mapping[int, str], steps: Counted) -> Mapping[str, Formula]:
    inner = grid_of(candidate)[1:]
    ranks: Ranks = (N / inner[0], sympy.Integer(inner[0])) if inner else (N,)
    if len(names) == 1:  # others were refused, so that nothing depends on N
        ranks = tuple(sympy.sympify(n).subs(N, *names) for n in ranks)
    as_what = f", as {', '.join(names.values())}" if inner else ""
    holds = f"on {', '.join(map(str, names))} ranks{as_what}, for tokens that divide as those that were counted"
    found = formulas_of(steps, LENGTHS, holds, ranks=ranks, work=WORK)
    return {name: replace(formula, names=names) for name, formula in found.items()}


def _times(names: Mapping[int, str], steps: Counted, hardware: Hardware | None) -> StepTimes:
    rows = steps[0][0][B]
    at = [(point, step) for point, step in steps if point[B] == rows]
    on = {n: parts_of([(int(point[S]), step) for point, step in at if point[N] == n]) for n in names}
    parts = {n: own for n, own in on.items() if own is not None}
    return StepTimes(parts, names, int(rows), gcd(*(int(point[S]) for point, _ in at)), hardware)


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
