"""Contractions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sptransform.op_rules import DEFAULT_RULES
from tests.support import grouped_kernel
from tests.support.brute_force import Case, call_of, case, check_case, ids, integers, randn, rule_for

aten, sp = torch.ops.aten, torch.ops.sptransform


def grouped(*args: Any, factors: str) -> Case:
    return case(sp.grouped_product.default, *args, grouped_kernel.NAME, factors=factors)



CASES = [
    case(aten.addmm.default, randn(5), randn(4, 6), randn(6, 5), factors="i j"),
    case(aten.addmm.default, randn(4, 5), randn(4, 6), randn(6, 5), factors="i j"),
    case(aten.addmm.default, randn(4, 1), randn(4, 6), randn(6, 5), beta=2, alpha=3),
    case(aten.addmm.default, randn(1, 5), randn(4, 6), randn(6, 5)),
    case(aten.addmm.default, randn(), randn(4, 6), randn(6, 5)),
    case(aten.baddbmm.default, randn(4, 3, 5), randn(4, 3, 6), randn(4, 6, 5), factors="b i j"),
    case(aten.baddbmm.default, randn(3, 5), randn(4, 3, 6), randn(4, 6, 5), factors="b i j"),
    case(aten.baddbmm.default, randn(5), randn(4, 3, 6), randn(4, 6, 5), beta=0.5),
    case(aten.baddbmm.default, randn(4, 1, 1), randn(4, 3, 6), randn(4, 6, 5)),
    case(aten.bmm.default, randn(4, 3, 6), randn(4, 6, 5), factors="b i k j"),
    case(aten.bmm.default, randn(1, 3, 6), randn(1, 6, 1), factors="i k"),
    case(aten.dot.default, randn(6), randn(6), factors="k"),
    case(aten.einsum.default, "bshd,bthd->bhst", [randn(2, 4, 3, 5), randn(2, 6, 3, 5)], factors="b s h d t"),
    case(aten.einsum.default, "bhst, bthd -> bshd", [randn(2, 3, 4, 6), randn(2, 6, 3, 5)]),
    case(aten.einsum.default, "ik,kj", [randn(4, 6), randn(6, 5)], factors="i k j"),
    case(aten.einsum.default, "b,a", [randn(4), randn(6)]),
    case(aten.einsum.default, "i,j->ij", [randn(4), randn(6)]),
    case(aten.einsum.default, "...ij,...jk->...ik", [randn(3, 4, 6), randn(6, 5)]),
    case(aten.einsum.default, "...ij->...ji", [randn(2, 3, 4, 6)]),
    case(aten.einsum.default, "ij->", [randn(4, 6)]),
    case(aten.einsum.default, "bij,jk,bk->i", [randn(2, 4, 3), randn(3, 5), randn(2, 5)]),
    case(aten.einsum.default, "bij,bj->bi", [randn(1, 4, 3), randn(2, 3)]),
    case(aten.linalg_solve_triangular.default, randn(4, 3, 3), randn(4, 3, 6), upper=False, factors=".1 k"),
    case(aten.linear.default, randn(2, 4, 6), randn(5, 6), factors=".1 .2 k o"),
    case(aten.linear.default, randn(2, 4, 6), randn(5, 6), randn(5), factors=".1 .2 o"),
    case(aten.linear.default, randn(6), randn(5, 6)),
    case(aten.linear.default, randn(6), randn(5, 6), randn(5)),
    case(aten.linear.default, randn(4, 1), randn(5, 1)),
    case(aten.matmul.default, randn(4, 6), randn(6, 5), factors="i k j"),
    case(aten.matmul.default, randn(4, 6), randn(3, 6, 5)),
    case(aten.matmul.default, randn(3, 4, 6), randn(6, 5)),
    case(aten.matmul.default, randn(3, 4, 6), randn(6)),
    case(aten.matmul.default, randn(6), randn(3, 6, 5)),
    case(aten.matmul.default, randn(6), randn(6, 5)),
    case(aten.matmul.default, randn(4, 6), randn(6)),
    case(aten.matmul.default, randn(6), randn(6)),
    case(aten.matmul.default, randn(2, 1, 4, 6), randn(3, 6, 5)),
    case(aten.matmul.default, randn(3, 4, 1), randn(3, 1, 5)),
    case(aten.matmul.default, randn(2, 3, 4, 6), randn(2, 3, 6, 5)),
    case(aten.mm.default, randn(4, 6), randn(6, 5), factors="i k j"),
    case(aten.mm.default, randn(1, 6), randn(6, 1), factors="k"),
    case(aten.mv.default, randn(4, 6), randn(6), factors="i k"),
    grouped(randn(6, 4), randn(3, 4, 5), integers(3, 6), 1, factors="n k f"),
    grouped(randn(6, 4), randn(3, 4, 5), integers(3, 12), 2, factors="n k f"),
    grouped(randn(1, 4), randn(3, 4, 5), integers(3, 2), 2, factors="k f"),
    grouped(randn(1, 4), randn(3, 4, 5), integers(3, 1), 1, factors="k f"),
]


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_rule(case: Case) -> None:
    check_case(case)


NO_RULE = [
    case(aten.einsum.default, "ii->i", [randn(4, 4)]),
    case(aten.einsum.default, "...ij->ij", [randn(3, 4, 5)]),
    case(aten.linalg_solve_triangular.default, randn(4, 3, 3), randn(4, 2, 3), upper=True, left=False),
    case(aten.linear.default, randn(4, 6), randn(6)),
]


@pytest.mark.parametrize("case", NO_RULE, ids=ids(NO_RULE))
def test_no_rule(case: Case) -> None:
    call, _, _ = call_of(case)
    assert DEFAULT_RULES.rule_of(call) is None


@pytest.mark.parametrize(
    ("case", "heavy"),
    [
        (case(aten.matmul.default, randn(4, 6), randn(6, 5)), True),
        (case(aten.matmul.default, randn(4, 1), randn(1, 5)), False),
        (case(aten.einsum.default, "i,j->ij", [randn(4), randn(6)]), False),
        (case(aten.einsum.default, "ik,kj->ij", [randn(4, 2), randn(2, 6)]), True),
    ],
    ids=str,
)
def test_an_outer_product_is_not_heavy(case: Case, heavy: bool) -> None:
    _, rule = rule_for(case)
    assert rule.heavy is heavy


@pytest.mark.parametrize(
    "case",
    [
        case(aten.bmm.default, randn(2, 4, 6), randn(2, 6, 5)),
        case(aten.dot.default, randn(6), randn(6)),
        case(aten.linear.default, randn(4, 6), randn(5, 6)),
        case(aten.matmul.default, randn(4, 6), randn(6, 5)),
        case(aten.mm.default, randn(4, 6), randn(6, 5)),
        case(aten.mv.default, randn(4, 6), randn(6)),
    ],
    ids=str,
)
def test_a_pending_sum_passes_either_operand_of_a_product(case: Case) -> None:
    _, rule = rule_for(case)
    assert set(rule.linear) == {frozenset({0}), frozenset({1})}
