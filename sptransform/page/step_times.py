"""The times of steps as JavaScript: a table of the ops of every option, and what each kind takes on every machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sympy

from sptransform.cost.hardware import Hardware, hardware_names, hardware_of
from sptransform.cost.time_formulas import Part, arguments_of, is_added, time_function
from sptransform.diagnostics.errors import UsageError
from sptransform.page.graphs import Pool
from sptransform.planning.records import Option


def step_times(options: Sequence[Option], chosen: str | None) -> dict[str, Any] | None:
    """What a script adds up; None without formulas, or without a machine where a step's time is a sum.

    ``parts``: (function, quantities, ranks); a quantity is a number in ``quantities``, expressions in S, and ranks
    are (first, stride, number). ``options``: of each, number of ranks -> (part, how often) alternately, in one list.
    """
    own = next((option.times.hardware for option in options if option.times is not None), None)
    if chosen is None or own is None:
        return None
    machines = {chosen: own, **{name: hardware_of(name) for name in hardware_names() if name != chosen}}
    quantities, parts, functions = Pool(), Pool(), Pool()

    def number_of(part: Part) -> int:
        own = tuple(quantities.number(sympy.jscode(each)) for each in part.quantities)
        ranks = part.ranks and (part.ranks[0], part.ranks[1] - part.ranks[0], len(part.ranks))
        return parts.number((functions.number(part.function), own, ranks))

    def of(option: Option) -> dict[int, list[int]]:
        on = {} if option.times is None else option.times.parts
        sums = {n: parts for n, parts in on.items() if any(_is_sum(parts, machine) for machine in machines.values())}
        return {n: [x for part, number in own.items() for x in (number_of(part), number)] for n, own in sums.items()}

    found = [of(option) for option in options]
    if not any(found):
        return None
    return {
        "options": found,
        "rows": [0 if option.times is None else option.times.rows for option in options],
        "multiples": [1 if option.times is None else option.times.multiple for option in options],
        "parts": parts.items,
        "quantities": quantities.items,
        "functions": functions.items,
        "arguments": [arguments_of(function) for function in functions.items],
        "machines": {name: _machine(hardware, functions.items) for name, hardware in machines.items()},
    }


def _is_sum(parts: Iterable[Part], hardware: Hardware) -> bool:
    return all(is_added(part.ranks, hardware) for part in parts if part.ranks)


def _machine(hardware: Hardware, functions: Sequence[str]) -> Mapping[str, Any]:
    """Each function as JavaScript; ``None`` where the machine lacks a constant of it."""
    return {
        "ranks": hardware["node.ranks"],
        "inside": hardware.get("inside.overlaps"),
        "between": hardware.get("between.overlaps"),
        "js": [_javascript(function, hardware) for function in functions],
    }


def _javascript(function: str, hardware: Hardware) -> str | None:
    try:
        return sympy.jscode(time_function(function, hardware))
    except UsageError:
        return None
