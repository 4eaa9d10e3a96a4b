"""From which number of ranks on one strategy sends fewer bytes than another: as formulas of both say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import sympy

from sptransform.cost.folding import LayerRun, run_of
from sptransform.cost.formulas import N, fitted, terms_of
from sptransform.diagnostics.errors import SPTransformError
from sptransform.inspection.reader import explanation_of
from sptransform.planning.judged import Trial, quietly
from sptransform.planning.records import Option

_COUNTED_AT = (2, 4)  # the bytes of a kind have one unknown factor each, so that the second count is a check
_UP_TO = 4096  # ranks for which the formulas are compared


def crossing(trial: Trial, chosen: Option, other: Option, runs: Mapping[str, LayerRun]) -> str:
    """``ulysses sends fewer bytes than ring from N = 5 on``; empty where no formula says so.

    Formulas hold where the lengths and the heads of the model divide by N.
    """
    if chosen is other or any(option.strategy.max_mesh_dims > 1 for option in (chosen, other)):
        return ""
    own, its = sent_by(trial, chosen, runs), sent_by(trial, other, runs)
    if own is None or its is None:
        return ""
    difference = sympy.lambdify(N, sympy.together(own - its))
    fewer = [n for n in range(2, _UP_TO + 1) if difference(n) < 0]
    if not fewer:
        return f"{other.name} sends no more bytes at any N" if difference(2) > 0 else ""
    first, last = fewer[0], fewer[-1]
    if len(fewer) != last - first + 1:
        return ""
    if last < _UP_TO:
        where = f"up to N = {last}" if first == 2 else f"from N = {first} to {last}"
    else:
        where = "at any N" if first == 2 else f"from N = {first} on"
    return f"{chosen.name} sends fewer bytes than {other.name} {where}, where heads divide"


def sent_by(trial: Trial, option: Option, runs: Mapping[str, LayerRun]) -> sympy.Expr | None:
    """The bytes of a training step in the number of ranks N; None if the counts follow no formula."""
    counts = {n: _counted(trial, option, n, runs) for n in _COUNTED_AT}
    if None in counts.values():
        return None
    parts = []
    for kind in sorted({kind for by_kind in counts.values() for kind in by_kind}):
        (terms,) = terms_of(kind, "all", [sympy.Integer(1)], (N,))
        parts.append(fitted(terms, [({N: n}, by_kind[kind]) for n, by_kind in counts.items()]))
    return None if None in parts else sympy.Add(*parts)


def _counted(trial: Trial, option: Option, num_ranks: int, runs: Mapping[str, LayerRun]) -> Counter[str] | None:
    """Kind -> bytes on rank 0; None where the strategy is blocked."""
    sent: Counter[str] = Counter()
    try:
        with quietly():
            explanation = explanation_of(trial(option.strategy, (num_ranks,), 0))
    except SPTransformError:
        return None
    for collective in explanation.collectives:
        sent[collective.kind] += collective.bytes_sent * run_of(collective.layer, runs).times
    return sent
