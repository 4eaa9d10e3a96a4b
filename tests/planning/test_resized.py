"""Formulas of a comparison, counted at other sizes: they equal counts at sizes that nobody fitted them to."""

from __future__ import annotations

import pytest
import torch

import sptransform
from sptransform import UsageError
from sptransform.cost.formulas import B, N, S
from sptransform.planning.resized import points
from tests.page.shown import WIDTH, Stack

pytestmark = pytest.mark.timeout(280)
STRATEGIES = ["ring", "allgather", "megatron", "ulysses"]


def resized(tokens: int, rows: int) -> dict[str, torch.Tensor]:
    return {"x": torch.zeros(rows, tokens, WIDTH, device="meta")}


@pytest.mark.slow
def test_formulas_equal_counts_elsewhere() -> None:
    with torch.device("meta"):
        model = Stack(1, heads=8)  # which 8 ranks divide
    found = sptransform.compare(model, resized(128, 1), world_size=8, strategies=STRATEGIES, resized=resized)
    elsewhere = {S: 256, B: 3, N: 4}
    counted = sptransform.compare(model, resized(256, 3), world_size=4, strategies=STRATEGIES)
    names = set()
    for option in found.runnable:
        (other,) = [each for each in counted.runnable if each.strategy == option.strategy]
        for name, formula in option.formulas.items():
            direction, what = name.split(" ")
            counts = {"bytes": other.step.bytes_sent, "messages": other.step.messages, "FLOPs": other.step.flops}
            if what in counts:
                assert formula.value(elsewhere) == counts[what](direction), (option.name, name)
                names.add((option.name, name))
    assert {("ring", "forward bytes"), ("ring", "backward bytes"), ("ring", "forward messages")} <= names
    assert {("ulysses", "forward bytes"), ("ulysses", "backward bytes")} <= names
    assert {("allgather", "forward bytes"), ("megatron", "forward bytes")} <= names


@pytest.mark.parametrize(("tokens", "num_ranks"), [(128, 4), (128, 6), (100, 8), (40, 8)])
def test_sizes_that_do_not_divide_are_refused(tokens: int, num_ranks: int) -> None:
    with pytest.raises(UsageError, match="formulas are counted on half and a quarter of the ranks"):
        list(points(tokens, 1, num_ranks))


def test_points_are_more_than_terms() -> None:
    found = [{S: 64, B: 1, N: 8}, *points(64, 1, 8)]
    assert len(found) == 6 and len({tuple(point.values()) for point in found}) == 6
    assert {point[N] for point in found} == {8, 4, 2} and {point[B] for point in found} == {1, 2}


OTHERS = {
    "the same whatever is asked": (lambda tokens, rows: resized(128, 1), "64, 1. makes inputs of 128 tokens, 1 rows"),
    "as many rows whatever is asked": (
        lambda tokens, rows: resized(tokens, 1),
        "128, 2. makes inputs of 128 tokens, 1",
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
