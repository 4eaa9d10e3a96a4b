"""Ops that communicate over one mesh dim, cut over the next: every dim they do not move, and sums pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sptransform.op_rules import DEFAULT_RULES
from tests.support.brute_force import OUTER, Case, call_of, check_case, ids, randn

sp = torch.ops.sptransform


def moved(target: Any, *args: Any, factors: str = "", same_values: bool = True, outer: int = 2) -> Case:
    """A call by each of two ranks of the first mesh dim."""
    return Case(target, args, {}, factors, same_values, outer=outer)


GATHER = moved(sp.all_gather.default, randn(4, 2, 3), "S(1:4/2)", OUTER, True, factors="d0 d2")
CASES = [
    moved(sp.all_to_all.default, [randn(2, 4, 4)], ["S(1:8/2)"], ["S(2:4/2)"], OUTER, factors="d0 block1 block2"),
    moved(
        sp.all_to_all.default,
        [randn(1, 8, 3, 2), randn(1, 4, 3, 2)],
        ["S(2:6/2)"] * 2,
        ["S(1:8[0:2,4:6|2:4,6:8])", "S(1:4[0:1,2:3|1:2,3:4])"],
        OUTER,
        factors="d3 tile1 block2",
    ),
    moved(  # tiles of other numbers
        sp.all_to_all.default,
        [randn(1, 8, 3, 2), randn(1, 8, 3, 2)],
        ["S(2:6/2)"] * 2,
        ["S(1:8[0:2,4:6|2:4,6:8])", "S(1:8[0:1,2:3,4:5,6:7|1:2,3:4,5:6,7:8])"],
        OUTER,
        factors="d3 block2",
    ),
    moved(
        sp.all_to_all.default,
        [randn(1, 4, 6, 2)],
        ["S(1:8[0:2,4:6|2:4,6:8])"],
        ["S(2:6/2)"],
        OUTER,
        factors="d3 tile1 block1 block2",
    ),
    moved(
        sp.all_to_all.default,
        [randn(2, 3, 4, 5), randn(2, 3, 2, 5)],
        ["S(1:6[0:1,4:6|1:4])"] * 2,
        ["S(2:4/2)", "S(2:2/2)"],
        OUTER,
        factors="d0 d3",
    ),
    moved(
        sp.all_to_all.default,
        [randn(4, 6, 2, 3), randn(4, 2, 2, 3), randn(4, 1, 2, 5)],
        ["S(2:4/2)"] * 3,
        ["S(0:4/2)"] * 3,
        OUTER,
        factors="d1 block0 block2",
    ),
    moved(sp.slice.default, randn(4, 8, 3), "S(1:8/2)", OUTER, True, factors="d0 d2"),
    moved(sp.slice.default, randn(3, 4), "S(1:4/2)", OUTER, False, factors="d0"),
    moved(sp.dropout_mask.default, randn(4, 3), 0.5, OUTER, factors=".2 .1", same_values=False),
    moved(sp.first_rank.default, randn(4, 3), OUTER, True, factors=".2 .1"),
    moved(sp.first_rank.default, randn(4, 3), OUTER, False, factors=".2 .1"),
    GATHER,
    moved(sp.all_gather.default, randn(4, 3), "S(0:2*4/2z)", OUTER, False, factors="d1"),
    moved(
        sp.all_gather_packed.default,
        [randn(1, 4, 2, 3), randn(1, 4, 2, 5)],
        ["S(2:4/2)"] * 2,
        OUTER,
        factors="d1",
    ),
    moved(sp.keep_own.default, randn(3, 4, 2), "S(1:6[0:4|2:6])", "S(1:6[0:3|3:6])", OUTER, factors="d0 d2"),
    moved(sp.local_index.default, torch.tensor([[0, 3, 2], [1, 2, 0]]), "4/2", OUTER, factors=".2 .1"),
    moved(sp.repartition.default, randn(3, 4, 2), "S(1:8/2z)", "S(1:8/2)", OUTER, factors="d0 d2"),
    moved(sp.replicate.default, [randn(3, 2)], OUTER, factors="d0 d1"),
    moved(sp.replicate.default, [randn(3, 2), randn(4)], OUTER),
    moved(sp.all_reduce.default, randn(4, 3), OUTER, True, factors=".2 .1"),
    moved(sp.all_reduce.default, randn(4, 3), OUTER, False, factors=".2 .1"),
    moved(sp.reduce_scatter.default, randn(4, 6, 3), "S(1:6/2)", OUTER, factors="d0 d2"),
]


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_rule(case: Case) -> None:
    check_case(case)


def test_sums_pass_all_but_several_parameters() -> None:
    held_up = [call for call, *_ in map(call_of, CASES) if not DEFAULT_RULES.rule_of(call).linear]
    found = [(call.target, len(call.operand_shapes)) for call in held_up]
    assert found == [(sp.dropout_mask.default, 1), (sp.local_index.default, 1), (sp.replicate.default, 2)]


def test_stripes_of_an_open_length_are_as_many_as_their_text_says() -> None:
    case = moved(sp.all_to_all.default, [randn(1, 64, 4)], ["S(1:?/2s/32)"], ["S(2:4/2)"], OUTER)
    call, *_ = call_of(case)
    sizes = DEFAULT_RULES.rule_of(call).sizes
    assert (sizes["tile1"], sizes["rank1"], sizes["block1"]) == (32, 2, 2)
