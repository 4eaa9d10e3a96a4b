"""Inputs of a model are found by how far attempts come, and by what errors ask for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sptransform.sweep import search
from sptransform.sweep.search import MOST, NothingRuns, Search


def test_what_comes_further_is_changed_further() -> None:
    """Far more combinations than attempts, of which one runs."""
    wanted = [5, 3, 4, 7]
    attempts = []

    def run(inputs: dict[str, Any]) -> list[int]:
        attempts.append(inputs)
        for value, right in zip(inputs.values(), wanted, strict=True):
            torch.ones(1)
            if value != right:
                raise ValueError
        return list(inputs.values())

    assert Search({name: range(8) for name in "abcd"}, run).found() == wanted
    assert len(attempts) < MOST < 8**4


@pytest.mark.parametrize(
    ("shape", "wanted"), [((2, 7, 5), (2, 7, 8)), ((2, 7), (2, 2, 8))], ids=["width", "dimensions and width"]
)
def test_an_error_says_what_is_wanted(shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    def run(inputs: dict[str, Any]) -> Tensor:
        _, _, _ = inputs["x"].shape
        functional.linear(inputs["x"], torch.ones(3, 8))
        return inputs["x"]

    assert Search({"x": [torch.randn(shape)]}, run).found().shape == wanted


def test_a_length_that_several_inputs_share_is_changed_in_all() -> None:
    def run(inputs: dict[str, Any]) -> list[int]:
        lengths = [x.shape[1] for x in inputs.values()]
        if lengths[0] % 4:
            raise ValueError(f"length {lengths[0]} has to be a multiple of 4; pad it to a length of {4 * 11}")
        inputs["ids"] + inputs["mask"]
        return lengths

    inputs = {"ids": [torch.arange(42).expand(2, 42)], "mask": [torch.ones(2, 42)]}
    assert Search(inputs, run).found() == [44, 44]


def test_the_reason_is_that_of_the_attempt_that_came_furthest() -> None:
    def run(inputs: dict[str, Any]) -> None:
        if inputs["x"] == 1:
            torch.ones(1)
            raise ValueError("far")
        raise ValueError("near")

    with pytest.raises(NothingRuns) as caught:
        Search({"x": [0, 1, 2]}, run).found()
    assert str(caught.value.__cause__) == "far"


def test_an_attempt_that_takes_too_long_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "LONGEST", 0.05)

    def run(inputs: dict[str, Any]) -> None:
        while True:
            torch.ones(8).sum()

    with pytest.raises(TimeoutError, match="longer than"):
        Search({"x": [torch.ones(2)]}, run).found()
