"""The time of a step as a function of its length equals the simulation of steps at lengths that nobody fitted it to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import sympy

from sptransform import USP
from sptransform.cost.formulas import S
from sptransform.cost.hardware import hardware_names, hardware_of
from sptransform.cost.records import Message, Step, Work
from sptransform.cost.simulate import simulate
from sptransform.cost.time_formulas import Part, StepTimes, is_added, parts_of
from tests.support.layers import layer_step

LENGTHS = (128, 256, 512)
SIZES = (("width", 16), ("heads", 8), ("key_heads", 4), ("dim", 8))


def step(tokens: int, *, more: int = 0, ranks: tuple[int, ...] = (0, 1, 2, 3)) -> Step:
    """A product, twice, a copy and an all-gather; ``more`` copies."""
    flops, traffic = 10**9 * tokens, 7 * tokens + 64
    product = Work("mm", "aten.mm", "matmul", "forward", "", None, "bfloat16", flops, traffic, copies=2)
    gather = Work("g", "gather", "message", "forward", "", message=Message("all_gather", 48 * tokens, ranks))
    copy = Work("copy", "copy", "memory", "forward", "", traffic=tokens**2)
    works = (product, gather, replace(gather, kind="wait"), *[copy] * (1 + more))
    return Step(works, 0, 4, 0, 0, 0)


def test_equal_ops_are_one_part() -> None:
    parts = parts_of([(tokens, step(tokens, more=1)) for tokens in LENGTHS])
    assert parts == {
        Part("matmul.bfloat16", (10**9 * S, 7 * S + 64)): 2,
        Part("all_gather", (48 * S,), (0, 1, 2, 3)): 1,
        Part("memory", (S**2,)): 2,
    }


def test_where_lengths_do_not_decide_there_is_nothing() -> None:
    assert parts_of([(tokens, step(tokens)) for tokens in LENGTHS[:2]]) is None, "two lengths check nothing"
    others = [(128, step(128)), (256, step(256, more=1)), (512, step(512))]
    assert parts_of(others) is None, "another number of ops"
    assert parts_of([(tokens, step(tokens, ranks=(0, tokens))) for tokens in LENGTHS]) is None, "other ranks"
    odd = [(tokens, step(tokens + tokens % 7)) for tokens in LENGTHS]
    assert parts_of(odd) is None, "no sum of few powers"


def test_times_are_claimed_for_what_was_counted() -> None:
    hardware = hardware_of("h100-nvlink")
    times = StepTimes({4: parts_of([(tokens, step(tokens)) for tokens in LENGTHS])}, {4: "x"}, 1, 128)
    expected = simulate(step(1280), hardware).seconds
    assert times.seconds(1280, 1, 4, hardware) == pytest.approx(expected, rel=1e-12)
    elsewhere = [times.seconds(*at, hardware) for at in ((1280, 2, 4), (1280, 1, 8), (1300, 1, 4))]
    assert elsewhere == [None, None, None]


def test_times_that_are_no_sum_are_not_claimed() -> None:
    times = StepTimes({4: parts_of([(tokens, step(tokens)) for tokens in LENGTHS])}, {4: "x"}, 1, 128)
    assert times.seconds(1280, 1, 4, hardware_of("l20-pcie")) is None, "messages run beside kernels"
    nodes = hardware_of("h100-ib")
    assert is_added((0, 1), nodes) and not is_added((0, 8), nodes), "between nodes they do"
    assert not is_added((0, 8), hardware_of("h100-nvlink")), "there is no link"


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize("strategy", ["ulysses", "ring", "allgather", "megatron", USP(ulysses=2, ring=2)], ids=str)
def test_a_time_is_the_simulated_one_at_lengths_it_has_not_seen(strategy: Any) -> None:
    shape = (2, 2) if isinstance(strategy, USP) else 4
    steps = [(tokens, layer_step(strategy, shape, 1, tokens, SIZES)) for tokens in LENGTHS]
    times = StepTimes({4: parts_of(steps)}, {4: "x"}, 1, 128)
    held = set()
    for tokens in (1152, 4096):
        unseen = layer_step(strategy, shape, 1, tokens, SIZES)
        for name in hardware_names():
            found = times.seconds(tokens, 1, 4, hardware_of(name))
            if found is not None:
                assert found == pytest.approx(simulate(unseen, name).seconds, rel=1e-12), (name, tokens)
                held.add(name)
    assert {"h100-nvlink", "h100-ib", "b200", "a100-nvlink"} <= held


def test_functions_are_javascript() -> None:
    parts = parts_of([(tokens, step(tokens)) for tokens in LENGTHS])
    assert {sympy.jscode(each) for part in parts for each in part.quantities} == {
        *("1000000000*S", "7*S + 64", "48*S", "Math.pow(S, 2)")
    }
