"""Formulas as JavaScript: what the sliders of a page compute is what Python computes, from the same expressions."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, prod
from typing import Any

import sympy

from sptransform.cost.formulas import B, Formula, N, S
from sptransform.diagnostics.errors import UsageError
from sptransform.planning.records import Option
from sptransform.planning.resized import sizes_of


def sliders(options: Sequence[Option]) -> dict[str, Any]:
    """For each option its formulas as functions of S, B and N, where they hold, and where the sliders stop."""
    return {
        "formulas": [
            {name: javascript(found.expression) for name, found in option.formulas.items()} for option in options
        ],
        "holds": [_holds(next(iter(option.formulas.values()), None)) for option in options],
        "names": list(dict.fromkeys(name for option in options for name in option.formulas)),
        **stops(options),
    }


def stops(options: Sequence[Option]) -> dict[str, Any]:
    """Where each slider stops: numbers of ranks at which formulas hold, powers of two, and the page's own sizes."""
    explained = [option for option in options if option.explanation is not None]
    ranks = {int(point[N]) for option in options for formula in option.formulas.values() for point in formula.at}
    at = {"N": max((prod(option.mesh) for option in explained), default=1), **_sizes(explained)}
    powers = {"S": (10, 25), "B": (0, 7)}
    found = {key: {2**power for power in range(*powers[key])} | {at.get(key, 1)} for key in powers}
    found["N"] = ranks | {at["N"]}
    return {**{key: sorted(sizes) for key, sizes in found.items()}, "at": at}


def _sizes(options: Sequence[Option]) -> dict[str, int]:
    """Tokens and rows of the first attention of the model, if it has one."""
    try:
        tokens, rows = sizes_of(options)
    except UsageError:
        return {}
    return {"S": tokens, "B": rows}


def _holds(formula: Formula | None) -> dict[str, Any]:
    """Where the formulas of an option hold, which were all counted at the same points.

    They claim to hold on the numbers of ranks at which they were counted, and for lengths that divide as those did.
    ``ranks``: what the strategy is called on each of these numbers.
    """
    if formula is None:
        return {"words": "", "multiple": 1, "ranks": {}}
    return {
        "words": formula.holds,
        "multiple": gcd(*(int(point[S]) for point in formula.at)),
        "ranks": {int(point[N]): formula.names.get(int(point[N]), "") for point in formula.at},
    }


def javascript(expression: sympy.Expr) -> str:
    """The expression of S, B and N as JavaScript. Raises ValueError if it has other symbols."""
    others = expression.free_symbols - {S, B, N}
    if others:
        raise ValueError(f"no slider for {', '.join(sorted(map(str, others)))}")
    return sympy.jscode(expression)
