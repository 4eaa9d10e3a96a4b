"""Formulas as JavaScript: what the sliders of a page compute is what Python computes, from the same expressions."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, prod
from typing import Any

import sympy

from sptransform.cost.formulas import B, Formula, N, Point, R, S, U
from sptransform.diagnostics.errors import UsageError
from sptransform.planning.records import Option
from sptransform.planning.resized import sizes_of


def sliders(options: Sequence[Option]) -> dict[str, Any]:
    """For each option its formulas as functions of S, B and N, and where the sliders stop."""
    formulas = [{name: _function(found) for name, found in option.formulas.items()} for option in options]
    return {
        "formulas": formulas,
        "names": list(dict.fromkeys(name for own in formulas for name in own)),
        **stops(options),
    }


def stops(options: Sequence[Option]) -> dict[str, Any]:
    """Where each slider stops: numbers of ranks at which formulas hold, powers of two, and the page's own sizes."""
    explained = [option for option in options if option.explanation is not None]
    ranks = {_ranks(point)[0] for option in options for formula in option.formulas.values() for point in formula.at}
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


def _function(formula: Formula) -> dict[str, Any]:
    """The right side of a function of S, B, N, R and U, and where it holds.

    What a formula claims it claims for the numbers of ranks at which it was counted, and for lengths that divide as
    those did. Where ranks are R x U, each N stands for the R and U that were counted.
    """
    return {
        "js": javascript(formula.expression),
        "text": str(formula.expression),
        "holds": formula.holds,
        "multiple": gcd(*(int(point.get(S, 0)) for point in formula.at)),
        "ranks": dict(_ranks(point) for point in formula.at),
    }


def _ranks(point: Point) -> tuple[int, tuple[int, int]]:
    """(N, (R, U)) of a point."""
    if R in point and U in point:
        return int(point[R]) * int(point[U]), (int(point[R]), int(point[U]))
    return int(point[N]), (1, int(point[N]))


def javascript(expression: sympy.Expr) -> str:
    """The expression of S, B, N, R and U as JavaScript. Raises ValueError if it has other symbols."""
    others = expression.free_symbols - {S, B, N, R, U}
    if others:
        raise ValueError(f"no slider for {', '.join(sorted(map(str, others)))}")
    return sympy.jscode(expression)
