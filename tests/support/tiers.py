"""Which tests are the quick tier: all that are not marked `slow`.

A test marked `covering(ways=n)` is a product of parameters. Of it the quick tier runs cases in which any `n` values of
`n` parameters meet, as few as will do; the others are marked slow here. Nearly all mistakes that a product finds show
where two particular values meet (Kuhn, Wallace, Gallo, "Software Fault Interactions", IEEE TSE 30(6), 2004).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import groupby
from typing import Any

import pytest
from allpairspy import AllPairs

INDUCTOR = pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow])


def tiered(values: Iterable[Any], *, quick: Collection[Any]) -> list[Any]:
    """The values of a parameter, or of several (tuples), with those that are not `quick` marked slow."""
    given = list(values)
    assert all(value in given for value in quick), f"not among the cases: {[x for x in quick if x not in given]}"
    return [_param(value, marks=() if value in quick else pytest.mark.slow) for value in given]


def _param(value: Any, marks: Any) -> Any:
    return pytest.param(*value, marks=marks) if isinstance(value, tuple) else pytest.param(value, marks=marks)


def mark_what_is_covered(items: Iterable[pytest.Item]) -> None:
    """Mark as slow what a covering set of a product leaves out."""
    products = (item for item in items if item.get_closest_marker("covering") is not None)
    for _, cases in groupby(products, key=lambda item: item.nodeid.partition("[")[0]):
        _mark_all_but_covering(list(cases))


def _mark_all_but_covering(cases: Sequence[Any]) -> None:
    """An axis is what one decorator gives; each case is a place on all of them."""
    axes = [_axis(cases, mark.args[0]) for mark in cases[0].iter_markers("parametrize")]
    ways = cases[0].get_closest_marker("covering").kwargs.get("ways")
    if ways not in range(1, len(axes) + 1) or any(case.get_closest_marker("slow") for case in cases):
        raise pytest.UsageError(
            f"{cases[0].nodeid}: covering(ways=n) is for a product of n or more parameters of which no value is slow, "
            f"here ways={ways} of {len(axes)}"
        )
    covering = {tuple(found) for found in AllPairs([sorted(set(axis)) for axis in axes], n=ways)}
    for case, place in zip(cases, zip(*axes, strict=True), strict=True):
        if place not in covering:
            case.add_marker(pytest.mark.slow)


def _axis(cases: Sequence[Any], names: str | Sequence[str]) -> list[int]:
    """Which of the decorator's values each case has; every case has the very same object."""
    names = names.split(",") if isinstance(names, str) else names
    values = [tuple(id(case.callspec.params[name.strip()]) for name in names) for case in cases]
    order = {value: index for index, value in enumerate(dict.fromkeys(values))}
    return [order[value] for value in values]
