"""Formulas equal counts wherever they claim to hold, and are the closed forms that the literature gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import pytest
import sympy

from sptransform import USP
from sptransform.cost.formulas import (
    B,
    Formula,
    N,
    Point,
    R,
    S,
    U,
    first_fitted,
    fitted,
    fixed_all_reduces,
    formulas_of,
    polynomials,
    tensors_reduced,
)
from sptransform.cost.records import Message, Step, Work
from tests.support.layers import layer_step

H, K, D, W = sympy.symbols("H K D W", positive=True, integer=True)
#: bytes of an element: bfloat16, and float32 for what a ring sums
E, SUMMED = 2, 4
SIZES = {H: 8, K: 4, D: 8, W: 16}
OPEN = [S * B * H * D, S * B * K * D, S * B * W, sympy.Integer(1)]


def steps_of(strategy: Any, points: Sequence[Point], **sizes: int) -> list[tuple[Point, Step]]:
    return [(SIZES | point, step_at(strategy, point, **sizes)) for point in points]


def step_at(strategy: Any, point: Point, **sizes: int) -> Step:
    at = SIZES | point
    sizes |= {"width": at[W], "heads": at[H], "key_heads": at[K], "dim": at[D]}
    if R in at:
        return layer_step(USP(ulysses=at[U], ring=at[R]), (at[R], at[U]), at[B], at[S], tuple(sizes.items()))
    return layer_step(strategy, at[N], at[B], at[S], tuple(sizes.items()))


def points() -> Iterator[Point]:
    """More than terms, each symbol with several values."""
    yield from ({N: n, S: s, B: 2} for n, s in ((2, 64), (4, 64), (4, 128)))
    yield from ({N: 2, S: 64, B: 3}, {N: 2, S: 64, B: 2, H: 16}, {N: 4, S: 64, B: 2, K: 8}, {N: 2, S: 64, B: 2, D: 16})
    yield from ({N: 2, S: 64, B: 2, W: 32}, {N: 4, S: 320, B: 5, H: 16, W: 32})


def grids() -> Iterator[Point]:
    for point, (r, u) in product(points(), [(2, 2), (4, 2), (2, 4)]):
        yield {symbol: size for symbol, size in point.items() if symbol != N} | {R: r, U: u}


# ---------------------------------------------------------------------------------------------------------------
# The closed forms. Bytes that one rank sends for one layer; c tokens a rank, a the share that others have.

c, a = S / N, (N - 1) / N
FORWARD = {
    "ulysses": 2 * (H + K) * B * c * D * a * E,
    "ring": 2 * K * B * c * D * (N - 1) * E,
    "allgather": 2 * K * B * c * D * (N - 1) * E,
}
BACKWARD = {
    "ulysses": 2 * (H + K) * B * c * D * a * E,
    "ring": 2 * K * B * c * D * (N - 1) * (E + SUMMED),
    "allgather": 2 * K * B * c * D * (N - 1) * E,
}
MESSAGES = {"ulysses": (2, 2), "ring": (N - 1, 2 * (N - 1)), "allgather": (1, 1)}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", FORWARD)
def test_the_closed_forms_are_found(strategy: str) -> None:
    found = formulas_of(steps_of(strategy, list(points())), OPEN, "heads divide")
    loss = 8 * a  # the sum of all tokens, one number
    assert sympy.expand(found["forward bytes"].expression - FORWARD[strategy] - loss) == 0
    assert sympy.expand(found["backward bytes"].expression - BACKWARD[strategy]) == 0
    forward, backward = MESSAGES[strategy]
    assert sympy.expand(found["forward messages"].expression - forward - 1) == 0
    assert sympy.expand(found["backward messages"].expression - backward) == 0


@pytest.mark.slow
def test_key_heads_that_ranks_share_are_sent_to_each() -> None:
    at = [{N: n, S: s, B: b, H: h} for n, s, b, h in product((4, 8), (64, 128), (2, 3), (8, 16))]
    steps = [(point | {K: 2, D: 8}, step_at("ulysses", point | {K: 2})) for point in at]
    found = formulas_of(steps, [S * B * H, S * B, sympy.Integer(1)], "N a multiple of K, a divisor of H")
    expected = (2 * H / N + 2) * B * S * 8 * a * E
    assert sympy.expand(found["forward bytes"].expression - expected - 8 * a) == 0
    assert sympy.expand(found["backward bytes"].expression - expected) == 0


@pytest.mark.slow
def test_usp_is_both() -> None:
    found = formulas_of(steps_of(None, list(grids())), OPEN, "heads divide by U")
    part = B * S / (R * U) * D
    moved, passed = 2 * (H + K) * part * (1 - 1 / U), 2 * K * part * (R - 1)
    (loss,) = {found["forward bytes"].expression.subs({S: 0})}
    assert sympy.expand(found["forward bytes"].expression - E * (moved + passed) - loss) == 0
    assert sympy.expand(found["backward bytes"].expression - E * moved - (E + SUMMED) * passed) == 0


@pytest.mark.slow
def test_megatron_gathers_and_scatters_the_width() -> None:
    """A layer between others: the first one need not gather inputs that every rank has."""
    deep, flat = (formulas_of(steps_of("megatron", list(points()), hidden=32, depth=n), OPEN, "") for n in (3, 2))
    for name, elements in (("forward bytes", 4), ("backward bytes", 6)):
        layer = deep[name].expression - flat[name].expression
        assert sympy.expand(layer - elements * B * S * W * a * E) == 0


# ---------------------------------------------------------------------------------------------------------------
# They hold where they say.


def small() -> list[Point]:
    return [{N: n, S: s, B: b} for n, s, b in product((2, 4), (64, 128, 192), (2, 3))] + [{N: 4, S: 320, B: 5}]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ulysses", "ring", "allgather", "megatron"])
def test_a_formula_is_the_count_at_places_it_has_not_seen(strategy: str) -> None:
    found = formulas_of(steps_of(strategy, small()), polynomials({S: 2, B: 1}), "heads divide")
    assert {"forward bytes", "backward bytes", "forward FLOPs", "backward FLOPs", "forward messages"} <= found.keys()
    for point in ({N: 2, S: 448, B: 1}, {N: 4, S: 1024, B: 7}):
        step = step_at(strategy, point)
        for direction in ("forward", "backward"):
            counts = {"bytes": step.bytes_sent(direction), "FLOPs": step.flops(direction)}
            for name, count in counts.items():
                assert found[f"{direction} {name}"].value(point) == count, (direction, name, point)


def test_only_what_counts_decide_is_claimed() -> None:
    x = sympy.Symbol("x")
    counts = [({x: n}, 3 * n**2 + 1) for n in range(1, 5)]
    assert fitted([1, x, x**2], counts) == 3 * x**2 + 1
    assert fitted([1, x, x**2], counts[:3]) is None  # nothing would be checked
    assert fitted([1, x], counts) is None  # there is no such formula
    assert fitted([1, x, 2 * x], counts) is None  # there are several
    assert Formula(3 * x**2 + 1, "").value({x: 2}) == 13


def test_bytes_that_are_rounded_down_have_a_formula_that_is() -> None:
    """Of a loss of 4 bytes, 16 ranks send 7 each, not 7.5. What grows with tokens is left to the fit."""
    at = [({N: n, S: s}, Counter({4: 1, 1024: 3, s * 24: 1})) for n, s in product((8, 16, 32), (64, 128))]
    found = fixed_all_reduces(at, N)
    assert [found.subs({N: n}) for n in (2, 8, 16, 32)] == [4 + 3072, 7 + 5376, 7 + 5760, 7 + 5952]
    assert "Math.floor" in sympy.jscode(found)


def test_a_tensor_is_known_by_what_is_sent_of_it() -> None:
    for size, n in product((1, 4, 8, 12, 30, 4096), (2, 3, 8, 64)):
        message = Message("all_reduce", 2 * size * (n - 1) // n, tuple(range(n)))
        work = Work("x", "x", "message", "forward", "", message=message, copies=5)
        step = Step((work,), 0, n, 0, 0, 0)
        assert tensors_reduced(step, "forward") == {"all": Counter({size: 5})}


def test_few_terms_are_tried_first() -> None:
    counts = [({N: n}, 24 // n) for n in (2, 4, 8)]
    assert first_fitted(counts, [[sympy.Integer(1)], [1 / N], [1 / N, 1 / N**2]]) == 24 / N
    assert first_fitted(counts, [[sympy.Integer(1)], [N]]) is None
