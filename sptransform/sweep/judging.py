"""Judge an architecture: under each strategy on each number of ranks, is it exact, refused, or wrong?

The model is captured once; its graph is rewritten for everything that is asked, and run on pretended ranks in lockstep.
Whether a difference from one device is rounding or a mistake, :mod:`sptransform.testing.rounding` tells. Every model
may differ by ``TOLERANCE``, since most compute something in float32.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from sptransform.compiler.rewrite import Rewritten
from sptransform.diagnostics.errors import SPTransformError, VerificationError
from sptransform.inspection.reader import explanation_of
from sptransform.op_rules import DEFAULT_RULES
from sptransform.sweep.one_device import Built, NotBuilt, built, said
from sptransform.sweep.records import Gathered, Need, Record, Status
from sptransform.sweep.registries import Architecture, versions
from sptransform.testing.capturing import while_captured
from sptransform.testing.equality import Result, worst_error
from sptransform.testing.pretended import Asked, Ranks, Runnable, for_ranks, forward_and_backward, parameter_names
from sptransform.testing.rounding import ROUNDINGS, TOLERANCE, TOLERANCE_IN_DOUBLE, moved_by_roundings, put_in_double


def judged(architecture: Architecture, asked: Sequence[Asked]) -> Iterator[Record]:
    """A record for each that is asked, as soon as it is known; or one that says why there are none."""
    before = torch.get_default_dtype()
    try:
        yield from _judged(architecture, asked)
    finally:
        torch.set_default_dtype(before)


def _judged(architecture: Architecture, asked: Sequence[Asked]) -> Iterator[Record]:
    start = time.monotonic()
    blank = Record(architecture.name, architecture.family, "", 0, Status.NOT_BUILT, versions())
    try:
        model = built(architecture)
    except NotBuilt as error:
        yield replace(blank, reason=error.args[1], seconds=time.monotonic() - start)
        return
    mode = "train" if model.model.training else "eval"
    blank = replace(blank, dtype=str(model.dtype).removeprefix("torch."), mode=mode)
    tolerance = TOLERANCE if model.dtype == torch.float64 else ROUNDINGS * rounding(model)
    for each, ranks in rewritten(model, asked).items():
        record = replace(blank, strategy=str(each.strategy), ranks=each.num_ranks)
        yield replace(_outcome(record, model, each, ranks, tolerance), seconds=time.monotonic() - start)
        start = time.monotonic()


def _outcome(record: Record, model: Built, asked: Asked, ranks: Ranks | Exception, tolerance: float) -> Record:
    try:
        if isinstance(ranks, Exception):
            raise ranks
        name, error = difference(model.reference, ranks)
        if error > tolerance and model.dtype == torch.float64:
            name, error = difference_in_double(model, asked)
            tolerance = TOLERANCE_IN_DOUBLE
        gathered = tuple(gathered_of(ranks))
    except Exception as raised:
        return failed(record, raised)
    if error > tolerance:
        reason = f"{name} differs by {error:.1e}, allowed is {tolerance:.0e}"
        return replace(record, status=Status.WRONG, reason=reason, error=error)
    status = Status.GATHERED if any(each.bytes for each in gathered) else Status.EXACT
    return replace(record, status=status, error=error, gathered=gathered)


def failed(record: Record, error: BaseException) -> Record:
    """Refused, if the error is one of ours and blames the model; else it crashed."""
    if isinstance(error, VerificationError):
        return replace(record, status=Status.CRASHED, reason=" ".join(str(error).splitlines()[:3]))
    if not isinstance(error, SPTransformError):
        return replace(record, status=Status.CRASHED, reason=said(error))
    fixes = [line.removeprefix("  fix: ") for line in str(error).splitlines() if line.startswith("  fix: ")]
    return replace(record, status=Status.REFUSED, reason=str(error).splitlines()[0], fix=" ".join(fixes))


def rewritten(model: Built, asked: Sequence[Asked]) -> dict[Asked, Ranks | Exception]:
    """What each rank runs for each that is asked, or why nothing does."""

    def use(gm: fx.GraphModule, inputs: list[Any]) -> dict[Asked, Ranks | Exception]:
        return {each: _rewritten(each, model, gm, inputs) for each in asked}

    try:
        return while_captured(model.model, use, **model.inputs)
    except Exception as error:
        return dict.fromkeys(asked, error)


def _rewritten(asked: Asked, model: Built, gm: fx.GraphModule, inputs: list[Any]) -> Ranks | Exception:
    try:
        return for_ranks(gm, inputs, parameter_names(model.model, inputs), asked, None, {})
    except Exception as error:
        return error


def step(graph: Runnable) -> Result:
    """One forward and backward of the graph, whose first output is the loss."""
    return forward_and_backward(graph, lambda outputs: next(x for x in outputs if isinstance(x, torch.Tensor)))


def difference(reference: Result, ranks: Ranks) -> tuple[str, float]:
    """The tensor that is farthest from the reference on any rank, and how far."""
    found = []
    for result in ranks.run(step):
        missing = reference.grads.keys() - result.grads.keys()
        found.append((f"the gradient of {min(missing)}", float("inf")) if missing else worst_error(reference, result))
    return max(found, key=lambda each: each[1])


def difference_in_double(model: Built, asked: Asked) -> tuple[str, float]:
    """The same for the model's graph in which every float32 is a float64."""

    def use(gm: fx.GraphModule, inputs: list[Any]) -> tuple[Result, Ranks | Exception]:
        put_in_double(gm)
        one = Runnable(gm, None, inputs, parameter_names(model.model, inputs))
        return step(one), _rewritten(asked, model, gm, inputs)

    reference, ranks = while_captured(model.model, use, **model.inputs)
    if isinstance(ranks, Exception):
        raise ranks
    return difference(reference, ranks)


def rounding(model: Built) -> float:
    """How far one device is from itself when every parameter moves by at most one rounding."""
    with moved_by_roundings(model.model.parameters()):
        moved = model.run()
    return worst_error(model.reference, moved)[1]


def gathered_of(ranks: Ranks) -> Iterator[Gathered]:
    """What ops get whole, by op and reason."""
    graph = ranks.graphs[0]
    explained = explanation_of(Rewritten(graph.graph_module, graph.context))
    known = {str(op) for op in DEFAULT_RULES}
    sizes: Counter[tuple[str, Need]] = Counter()
    for each in explained.fallbacks:
        sizes[each.op, Need.FORM if each.op in known else Need.RULE] += each.gathered_bytes
    for each in explained.gathered:
        sizes[each.op, Need.NATURE] += each.gathered_bytes
    yield from (Gathered(op, need, size) for (op, need), size in sorted(sizes.items()))
