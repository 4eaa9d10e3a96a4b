"""One captured graph under one strategy after the other: what each sends, computes and holds."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from math import prod

from torch import Tensor

from sptransform.compiler.rewrite import Rewritten
from sptransform.cost.folding import LayerRun, run_of
from sptransform.cost.hardware import Hardware
from sptransform.cost.read import step_of
from sptransform.cost.records import Step
from sptransform.cost.simulate import simulate
from sptransform.diagnostics import provenance
from sptransform.diagnostics.errors import SPTransformError
from sptransform.engine.strategy import Strategy
from sptransform.graph import dataflow, notes
from sptransform.inspection.attended_work import Documents
from sptransform.inspection.explanation import Explanation
from sptransform.inspection.reader import explanation_of
from sptransform.planning.candidates import Candidate
from sptransform.planning.records import Option
from sptransform.sharding.placement import Shard

# (a strategy, the ranks of each mesh dim, a rank) -> what that rank would run
Trial = Callable[[Strategy, tuple[int, ...], int], Rewritten]


def _now(compute: Callable[[], Step]) -> Callable[[], Step]:
    step = compute()
    return lambda: step


def judged(
    candidate: Candidate,
    trial: Trial,
    hardware: Hardware | None,
    runs: Mapping[str, LayerRun],
    documents: Documents | None = None,
    call: Callable[[Callable[[], Step]], Callable[[], Step]] = _now,
) -> Callable[[], Option]:
    """A function that gives the candidate's step on its busiest rank; blocked, if this library refuses it.

    Other errors are raised. ``runs``: of the graph that ``trial`` rewrites, see
    :func:`sptransform.cost.folding.fold_layers`. ``call`` begins to count the step, and returns what gives it.
    """
    option = Option(candidate.name, candidate.strategy, candidate.shape)
    try:
        explanation = explanation_of(trial(candidate.strategy, candidate.shape, 0), documents)
        pairs = pairs_of_ranks(explanation, runs)
        busiest = busiest_of(explanation.rewritten, candidate.shape, pairs, runs)
        if busiest:
            explanation = explanation_of(trial(candidate.strategy, candidate.shape, busiest), documents)
        counted = call(partial(step_of, explanation.rewritten, runs=runs))
    except SPTransformError as error:
        blocked = replace(option, blocked=str(error))
        return lambda: blocked
    finally:
        gc.collect(0)  # what was made since the last option, where collection is paused

    def found() -> Option:
        try:
            step = counted()
        except SPTransformError as error:
            return replace(option, blocked=str(error))
        timeline = None if hardware is None else simulate(step, hardware)
        return replace(option, rank=busiest, explanation=explanation, pairs=pairs, step=step, timeline=timeline)

    return found


def pairs_of_ranks(explanation: Explanation, runs: Mapping[str, LayerRun]) -> tuple[int, ...]:
    """For every rank, how many pairs of a query and a key it attends in the forward, in all layers."""
    weighted = ([n * run_of(work.layer, runs).times for n in work.pairs] for work in explanation.attention)
    return tuple(map(sum, zip(*weighted, strict=True)))


def busiest_of(
    rewritten: Rewritten, shape: Sequence[int], pairs: Sequence[int], runs: Mapping[str, LayerRun]
) -> int:
    """The rank that attends the most pairs; of several, the one whose parts of tensors are the largest."""
    ranks = list(product(*map(range, shape)))
    parts = [0] * len(ranks)
    for node in rewritten.graph_module.graph.nodes:
        value, placements = dataflow.value(node), notes.placement_by_dim(node)
        cuts = [(dim, cut) for dim, cut in enumerate(placements) if isinstance(cut, Shard)]
        if not isinstance(value, Tensor) or all(cut.partition.is_even for _, cut in cuts):
            continue
        cut_dims = {cut.dim for _, cut in cuts}
        others = prod(size for dim, size in enumerate(value.shape) if dim not in cut_dims)
        others *= run_of(provenance.module_path(node), runs).times
        for index, rank in enumerate(ranks):
            parts[index] += others * prod(cut.outer * cut.partition.local_sizes[rank[dim]] for dim, cut in cuts)
    most = max(pairs, default=0)
    able = [index for index in range(len(ranks)) if not pairs or pairs[index] == most]
    return max(able, key=parts.__getitem__)


def ranked(options: Iterable[Option]) -> tuple[Option, ...]:
    """The best first: by simulated time, without hardware by bytes; those that are blocked come last."""
    return tuple(sorted(options, key=_order))


def _order(option: Option) -> tuple[bool, float, int, int]:
    if option.step is None:
        return True, 0.0, 0, 0
    seconds = 0.0 if option.timeline is None else option.timeline.seconds
    return False, seconds, option.step.bytes_sent(), option.step.messages()


@contextmanager
def quietly() -> Iterator[None]:
    """Within, what the compiler logs of each strategy that is tried is left out: the options say it."""
    log = logging.getLogger("sptransform")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
