"""Formulas as JavaScript: what the sliders of a page compute is what Python computes, from the same expressions."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import sympy

from sptransform.cost.formulas import B, Formula, N, S
from sptransform.graph import notes
from sptransform.planning.records import Option


def sliders(options: Sequence[Option]) -> dict[str, Any]:
    """For each option its formulas as functions of S, B and N, and where the sliders stop."""
    formulas = [{name: _function(found) for name, found in option.formulas.items()} for option in options]
    return {
        "formulas": formulas,
        "names": list(dict.fromkeys(name for own in formulas for name in own)),
        **stops(options),
    }


def stops(options: Sequence[Option]) -> dict[str, Any]:
    """Where each slider stops: powers of two, and the page's own sizes, at which it begins."""
    explained = [option for option in options if option.explanation is not None]
    ranks = {n for option in options for formula in option.formulas.values() for n in formula.ranks or ()}
    at = {"N": max((prod(option.mesh) for option in explained), default=1), **_sizes(explained)}
    powers = {"N": (0, 11), "S": (10, 25), "B": (0, 7)}
    found = {key: {2**power for power in range(*powers[key])} | {at[key]} for key in at}
    found["N"] |= ranks
    return {**{key: sorted(sizes) for key, sizes in found.items()}, "at": at}


def _sizes(options: Sequence[Option]) -> dict[str, int]:
    """Tokens and rows of the first attention of the model."""
    for option in options:
        for node in option.explanation.rewritten.graph_module.graph.nodes:
            for rule, _ in notes.decided(node)[:1]:
                tokens, rows = (rule.sizes.get(rule.roles.get(role), 1) for role in ("queries", "batch"))
                if isinstance(tokens, int) and isinstance(rows, int):
                    return {"S": tokens, "B": rows}
    return {"S": 1024, "B": 1}


def _function(formula: Formula) -> dict[str, Any]:
    """The right side of a function of S, B and N; what else is open is no slider, so such a formula is left out."""
    return {
        "js": javascript(formula.expression),
        "text": str(formula.expression),
        "holds": formula.holds,
        "multiple": formula.multiple,
        "ranks": formula.ranks,
    }


def javascript(expression: sympy.Expr) -> str:
    """The expression of S, B and N as JavaScript. Raises ValueError if it has other symbols."""
    others = expression.free_symbols - {S, B, N}
    if others:
        raise ValueError(f"no slider for {', '.join(sorted(map(str, others)))}")
    return sympy.jscode(expression)
