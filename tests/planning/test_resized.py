"""Formulas of a comparison, counted at other sizes: they equal counts at sizes that nobody fitted them to."""

from __future__ import annotations

import pytest
import sympy
import torch

import sptransform
from sptransform import USP, UsageError
from sptransform.cost.formulas import B, N, S, _traffic, fitted, polynomials
from sptransform.planning.candidates import Candidate, candidates, grid_of, with_outer
from sptransform.planning.resized import PLACES, check_divisible, outer_sizes
from tests.page.shown import WIDTH, Layer, Stack

pytestmark = pytest.mark.timeout(280)
STRATEGIES = ["ring", "megatron", "ulysses", USP(ulysses=2), ("ring", "megatron")]


def resized(tokens: int, rows: int) -> dict[str, torch.Tensor]:
    return {"x": torch.zeros(rows, tokens, WIDTH, device="meta")}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_formulas_equal_counts_elsewhere() -> None:
    with torch.device("meta"):
        model = Stack(1, heads=8)  # which 8 ranks divide
    found = sptransform.compare(model, resized(256, 1), world_size=8, strategies=STRATEGIES, resized=resized)
    elsewhere = {S: 512, B: 3, N: 4}
    counted = sptransform.compare(model, resized(512, 3), world_size=4, strategies=STRATEGIES)
    others = {option.name: option for option in counted.runnable}
    names: dict[str, set[str]] = {}
    for option in found.runnable:
        for name, formula in option.formulas.items():
            if (other := others.get(formula.names.get(4, ""))) is None:  # N changes its outer mesh dim: not to 4
                continue
            direction, what = name.split(" ")
            step = other.step
            counts = {"bytes": step.bytes_sent, "messages": step.messages, "FLOPs": step.flops}
            count = counts[what](direction) if what in counts else _traffic(step.of(direction))
            assert formula.value(elsewhere) == count, (option.name, name)
            names.setdefault(other.name, set()).add(name)
    assert names.keys() == {"ring", "megatron", "ulysses", "usp 2 x 2", "ring 2 x megatron 2"}
    for each, found_names in names.items():
        wanted = {f"{direction} {of}" for direction in ("forward", "backward") for of in ("bytes", "messages", "FLOPs")}
        assert wanted <= found_names, each
    assert {"forward traffic", "backward traffic"} <= names["ring"] & names["usp 2 x 2"]


class Returned(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Layer(heads=8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.inner(x)
        return x.sum(), x


@pytest.mark.timeout(120)
@pytest.mark.parametrize("strategy", ["ring", "allgather"])
def test_a_sequence_that_is_returned_in_order(strategy: str) -> None:
    """Such as logits: a zigzag is undone, for which a rank sends another share than for a ring."""
    with torch.device("meta"):
        model = Returned()
    (found,) = sptransform.compare(model, resized(64, 1), world_size=2, strategies=[strategy], resized=resized).options
    (counted,) = sptransform.compare(model, resized(96, 3), world_size=4, strategies=[strategy]).options
    for direction in ("forward", "backward"):
        value = found.formulas[f"{direction} bytes"].value({S: 96, B: 3, N: 4})
        assert value == counted.step.bytes_sent(direction)


@pytest.mark.parametrize(("tokens", "num_ranks"), [(128, 32), (128, 6), (100, 8), (32, 8)])
def test_sizes_that_do_not_divide_are_refused(tokens: int, num_ranks: int) -> None:
    with pytest.raises(UsageError, match="formulas are counted at a quarter of the tokens too"):
        check_divisible(tokens, num_ranks)


@pytest.mark.parametrize(
    ("size", "sizes"), [(64, (64, 32, 16)), (8, (8, 4, 2)), (4, (4, 2, 8)), (2, (2, 4, 8)), (6, (6, 3, 12))]
)
def test_other_numbers_of_ranks(size: int, sizes: tuple[int, ...]) -> None:
    assert outer_sizes(size) == sizes


def test_there_are_more_counts_than_unknowns() -> None:
    """Terms of tokens, rows and ranks, shared and whole: all of these are decided, and two counts are left over."""
    at = [(1, 1, 0), *((times, rows, n) for (times, rows), sizes in PLACES.items() for n in sizes)]
    points = [{S: int(64 * times), B: rows, N: outer_sizes(8)[n]} for times, rows, n in at]
    terms = [length / n for length in polynomials({S: 1, B: 1}) for n in (1, N)]
    wanted = sum((k + 2) * term for k, term in enumerate(terms))
    counts = [(point, wanted.subs(point)) for point in points]
    assert sympy.expand(fitted(terms, counts) - wanted) == 0 and len(counts) >= len(terms) + 1


def test_the_outer_mesh_dim_is_what_changes() -> None:
    (usp,) = [each for each in candidates((8,), ["usp"]) if each.name == "usp 4 x 2"]
    assert grid_of(usp) == (2, 4)
    assert with_outer(usp, 8) == Candidate("usp 4 x 8", USP(ulysses=4, ring=8), (32,))
    (pair,) = [each for each in candidates((8,), [("ring", "megatron")]) if each.shape == (4, 2)]
    assert with_outer(pair, 2) == Candidate("ring 2 x megatron 2", pair.strategy, (2, 2))
    (ring,) = candidates((8,), ["ring"])
    assert with_outer(ring, 4) == Candidate("ring", ring.strategy, (4,))


OTHERS = {
    "the same whatever is asked": (lambda tokens, rows: resized(128, 1), "64, 2. makes inputs of 128 tokens, 1 rows"),
    "as many rows whatever is asked": (
        lambda tokens, rows: resized(tokens, 1),
        "64, 2. makes inputs of 64 tokens, 1",
    ),
    "no function": (5, "found: 5"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_inputs_of_another_size_than_asked_for_are_refused(name: str) -> None:
    """Formulas would be fitted to counts at sizes that were not counted."""
    given, says = OTHERS[name]
    with torch.device("meta"):
        model = Stack(1)
    with pytest.raises(UsageError, match=f"resized (makes|is a function)(.|\n)*{says}"):
        sptransform.compare(model, resized(128, 1), world_size=8, strategies=["ring"], resized=given)
