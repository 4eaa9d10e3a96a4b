"""Embedding, gather and advanced indexing."""

from __future__ import annotations

import pytest
import torch

from sptransform.op_rules import DEFAULT_RULES
from tests.support.brute_force import Case, booleans, call_of, case, check_case, ids, integers, randn

aten = torch.ops.aten

CASES = [
    case(aten.bucketize.Tensor, integers(7, 4, 3), torch.tensor([0, 2, 2, 5]), factors=".1 .2"),
    case(aten.bucketize.Tensor, integers(7, 4), torch.tensor([0, 2, 2, 5]), right=True, factors=".1"),
    case(aten.embedding.default, randn(7, 5), integers(7, 2, 6), factors=".1 .2 h v"),
    case(aten.embedding.default, randn(7, 5), integers(7, 1, 6), 3, factors=".1 h v"),
    case(aten.embedding.default, randn(7, 5), integers(7)),
    case(aten.embedding.default, randn(7, 5), torch.tensor([3, 0, 3, 6, 3]), 3),
    case(aten.embedding.default, randn(2, 5), torch.tensor([[1, 0]]), 0, factors="v h .1"),
    case(aten.gather.default, randn(4, 6), 1, integers(6, 4, 3), factors="i0 i1"),
    case(aten.gather.default, randn(4, 6), -1, integers(6, 4, 1), factors="i0 o1"),
    case(aten.gather.default, randn(4, 6), 0, integers(4, 5, 6), factors="i0 i1"),
    case(aten.gather.default, randn(4, 6), 0, integers(4, 5, 3), factors="i0"),
    case(aten.gather.default, randn(4, 6), 1, integers(6, 1, 6), factors="i1"),
    case(aten.gather.default, randn(2, 4, 6), 1, integers(4, 2, 1, 6), factors="i0 o1 i2"),
    case(aten.gather.default, randn(6), 0, integers(6, 4)),
    case(aten.gather.default, randn(), 0, integers(1)),
    case(aten.index.Tensor, randn(4, 6), [integers(4, 5)], factors="b1 i1"),
    case(aten.index.Tensor, randn(4, 6), [None, integers(6, 2, 3)], factors="i0 b1 b2"),
    case(aten.index.Tensor, randn(4, 6), [integers(4, 3, 1), integers(6, 5)]),
    case(aten.index.Tensor, randn(2, 4, 6), [None, integers(4, 3), integers(6, 3)]),
    case(aten.index.Tensor, randn(2, 4, 6), [integers(2, 3), None, integers(6, 3)]),
    case(aten.index.Tensor, randn(2, 4, 6), [integers(2, 3, 1, 1), None, integers(6, 5)]),
    case(aten.index.Tensor, randn(4, 6), [integers(4)]),
    case(aten.index_select.default, randn(4, 6), 0, integers(4, 5), factors="n i1"),
    case(aten.index_select.default, randn(4, 6), -1, integers(6, 1), factors="i0"),
    case(aten.index_select.default, randn(4, 6), 1, integers(6)),
    case(aten.searchsorted.Tensor, torch.tensor([0, 2, 5]), integers(7, 6), factors=".1"),
    case(aten.searchsorted.Tensor, torch.tensor([0, 2, 5]), integers(7, 4, 6), right=True, factors=".1 .2"),
]


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_rule(case: Case) -> None:
    check_case(case)


NO_RULE = [
    case(aten.index.Tensor, randn(4, 6), [booleans(4, 6)]),
    case(aten.searchsorted.Tensor, torch.tensor([[0, 2], [1, 5]]), integers(7, 2, 6)),
    case(aten.searchsorted.Tensor, torch.tensor([2, 0]), integers(7, 6), sorter=torch.tensor([1, 0])),
    case(aten.index.Tensor, randn(4, 6), [torch.tensor([True, False, True, False])]),
    # counts of an index over the whole batch scale its gradient
    case(aten.embedding.default, randn(7, 5), integers(7, 6), -1, True),
]


@pytest.mark.parametrize("case", NO_RULE, ids=ids(NO_RULE))
def test_no_rule(case: Case) -> None:
    call, _, _ = call_of(case)
    assert DEFAULT_RULES.rule_of(call) is None
