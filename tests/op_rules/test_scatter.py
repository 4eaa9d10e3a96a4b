"""Scatters, index_add, index_put, one_hot, histc."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sptransform.op_rules import DEFAULT_RULES
from tests.support.brute_force import Case, booleans, call_of, case, check_case, ids, integers, randn

aten = torch.ops.aten


def distinct(rows: int, size: int, num: int) -> torch.Tensor:
    """Indices of which no row has one twice: else which of two entries is written is undefined."""
    generator = torch.Generator().manual_seed(5)
    return torch.stack([torch.randperm(size, generator=generator)[:num] for _ in range(rows)])


def part_of(whole: Case) -> Case:
    """A part of the source is written: torch has no gradient for it."""
    return replace(whole, constant=("src",))


CASES = [
    case(aten.histc.default, integers(7, 4, 6).double(), 7, 0, 6, factors=".1 .2"),
    case(aten.histc.default, integers(7, 6).double(), 4, 1, 3, factors=".1"),
    case(aten.index_add.default, randn(4, 6), 0, integers(4, 5), randn(5, 6), factors="i1 n"),
    case(aten.index_add.default, randn(4, 6), -1, integers(6, 5), randn(4, 5), alpha=2, factors="i0 n"),
    case(aten.index_add.default, randn(1, 6), 0, integers(1, 5), randn(5, 6), factors="i1 n"),
    case(aten.index_add.default, randn(4, 6), 1, integers(6, 1), randn(4, 1), factors="i0"),
    case(aten.index_put.default, randn(4, 6), [distinct(1, 4, 3)[0]], randn(3, 6), factors="i1"),
    case(aten.index_put.default, randn(4, 6), [distinct(1, 4, 3)[0]], randn(6), factors="i1"),
    case(aten.index_put.default, randn(4, 6), [integers(4, 5)], randn(5, 6), True, factors="i1 b1"),
    case(aten.index_put.default, randn(4, 6), [integers(4, 5)], randn(5, 1), True, factors="i1 b1"),
    case(aten.index_put.default, randn(4, 6), [None, integers(6, 2, 5)], randn(6)[0], True, factors="i0 b1 b2"),
    case(aten.index_put.default, randn(4, 3, 6), [integers(4, 5), None, integers(6, 5)], randn(5, 3), True),
    case(aten.one_hot.default, integers(5, 4, 6), 5, factors=".1 .2"),
    case(aten.scatter.src, randn(4, 6), 1, distinct(4, 6, 3), randn(4, 3), factors="i0"),
    part_of(case(aten.scatter.src, randn(4, 6), 1, distinct(4, 6, 3), randn(4, 5), factors="i0")),
    part_of(case(aten.scatter.src, randn(4, 6), 1, distinct(3, 6, 3), randn(4, 3), factors="")),
    case(aten.scatter.value, randn(4, 6), -1, distinct(4, 6, 3), 1.5, factors="i0"),
    case(aten.scatter.value, randn(6), 0, distinct(1, 6, 1)[0], 1.5, factors=""),
    case(aten.scatter_add.default, randn(4, 6), 0, integers(4, 5, 6), randn(5, 6), factors="i1 n"),
    part_of(case(aten.scatter_add.default, randn(4, 6), 0, integers(4, 5, 6), randn(7, 6), factors="i1")),
    case(aten.scatter_add.default, randn(4, 6), 0, integers(4, 5, 3), randn(5, 3), factors="n"),
    case(aten.scatter_add.default, randn(4), 0, integers(4, 6), randn(6), factors="n"),
    case(aten.select_scatter.default, randn(4, 6, 3), randn(4, 3), 1, 2, factors="i0 i2"),
    case(aten.slice_scatter.default, randn(4, 6), randn(4, 3), 1, 2, 5, factors="i0 i1"),
    case(aten.slice_scatter.default, randn(4, 6), randn(4, 3), 1, -3, factors="i0 i1"),
    case(aten.slice_scatter.default, randn(4, 6), randn(4, 2), 1, -9, 2, factors="i0 i1"),
    case(aten.slice_scatter.default, randn(4, 6), randn(4, 6), 1, factors="i0 i1"),
    case(aten.slice_scatter.default, randn(4, 6), randn(4, 1), 1, 2, 3, factors="i0"),
    case(aten.slice_scatter.default, randn(4, 6), randn(4, 3), 1, 0, 6, 2, factors="i0"),
]


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_rule(case: Case) -> None:
    check_case(case)


NO_RULE = [
    # the data says where bins begin and end
    case(aten.histc.default, randn(6), 4, 0, 0),
    case(aten.index_add.default, randn(4, 6), 0, integers(4), randn(1, 6)),
    case(aten.index_put.default, randn(4, 6), [booleans(4, 6)], randn(6)[0]),
    case(aten.one_hot.default, integers(5, 4)),
]


@pytest.mark.parametrize("case", NO_RULE, ids=ids(NO_RULE))
def test_no_rule(case: Case) -> None:
    call, _, _ = call_of(case)
    assert DEFAULT_RULES.rule_of(call) is None
