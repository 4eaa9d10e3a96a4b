"""Views, permutations, expansions, repeats."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sptransform.op_rules import DEFAULT_RULES
from tests.support.brute_force import Case, call_of, case, check_case, ids, randn, rule_for

aten = torch.ops.aten

CASES = [
    case(aten._reshape_alias.default, randn(4, 6), [24], [1]),
    case(aten._unsafe_view.default, randn(2, 4, 6), [8, 6]),
    case(aten.expand.default, randn(4, 1), [4, 6], factors="i0 i1"),
    case(aten.expand.default, randn(4, 1), [3, -1, 6], factors="i0 i1 i2"),
    case(aten.expand.default, randn(), [4]),
    case(aten.flatten.using_ints, randn(2, 4, 6)),
    case(aten.flatten.using_ints, randn(2, 4, 6), 1, -1),
    case(aten.movedim.int, randn(2, 4, 6), -1, 0),
    case(aten.movedim.int, randn(2, 4, 1), 0, 1),
    case(aten.permute.default, randn(2, 4, 6), [2, 0, 1]),
    case(aten.permute.default, randn(2, 1, 4, 6), [0, -2, 1, -1]),
    case(aten.repeat.default, randn(4, 6), [1, 2]),
    case(aten.repeat.default, randn(4, 6), [3, 2, 1]),
    case(aten.repeat.default, randn(1, 6), [4, 1]),
    case(aten.repeat.default, randn(6), [4]),
    case(aten.repeat_interleave.self_int, randn(2, 4, 6), 3, 1),
    case(aten.repeat_interleave.self_int, randn(2, 4, 6), 2, -1, output_size=12),
    case(aten.repeat_interleave.self_int, randn(4, 1), 3, 1),
    case(aten.repeat_interleave.self_int, randn(4, 6), 1, 0),
    case(aten.repeat_interleave.self_int, randn(6), 2, factors="i0 g"),
    case(aten.reshape.default, randn(2, 4, 6), [8, 6], factors="f24 f6 f1"),
    case(aten.reshape.default, randn(8, 6), [2, 4, -1, 3]),
    case(aten.reshape.default, randn(2, 6, 2), [4, 6], factors="f12 f6 f2 f1"),
    case(aten.reshape.default, randn(2, 6), [3, 4], factors=""),
    case(aten.reshape.default, randn(4, 2, 3), [4, 3, 2], factors="f6"),
    case(aten.reshape.default, randn(4, 3, 5), [2, 6, 5], factors="f30 f15 f5 f1"),
    case(aten.reshape.default, randn(2, 6), [4, 3], factors="f6 f3 f1"),
    case(aten.reshape.default, randn(4, 1, 6), [1, 24, 1]),
    case(aten.reshape.default, randn(1), []),
    case(aten.squeeze.default, randn(4, 1, 6, 1)),
    case(aten.squeeze.dim, randn(4, 1, 6), 1),
    case(aten.squeeze.dim, randn(4, 1, 6), 0),
    case(aten.squeeze.dims, randn(4, 1, 6, 1), [1, -1]),
    case(aten.mT.default, randn(3, 4, 6), factors="i0 i1 i2"),
    case(aten.numpy_T.default, randn(4, 6), factors="i0 i1"),
    case(aten.t.default, randn(4, 6)),
    case(aten.t.default, randn(6)),
    case(aten.transpose.int, randn(2, 4, 6), 1, -1),
    case(aten.unflatten.int, randn(4, 6), -1, [2, 3]),
    case(aten.unflatten.int, randn(12, 5), 0, [-1, 2]),
    case(aten.unsqueeze.default, randn(4, 6), 1),
    case(aten.unsqueeze.default, randn(4, 6), -1),
    case(aten.view.default, randn(2, 4, 6), [2, 4, 2, 3]),
    case(aten.view.default, randn(2, 4, 6), [2, -1]),
    case(aten.view_as.default, randn(4, 6), randn(2, 2, 6)),
]


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_rule(case: Case) -> None:
    check_case(case)


NO_RULE = [
    case(aten.repeat_interleave.self_int, randn(4, 6), 2),
    case(aten.reshape.default, randn(0, 6), [6, 0]),
]


@pytest.mark.parametrize("case", NO_RULE, ids=ids(NO_RULE))
def test_no_rule(case: Case) -> None:
    call, _, _ = call_of(case)
    assert DEFAULT_RULES.rule_of(call) is None


def test_a_flattened_sequence_keeps_its_factors() -> None:
    _, rule = rule_for(case(aten.view.default, randn(2, 4, 6), [8, 6]))
    (batch,), (sequence,), (hidden,) = rule.operands[0]
    assert rule.results[0] == ((batch, sequence), (hidden,))


_SIZES = st.lists(st.sampled_from([1, 2, 2, 3, 4, 6]), min_size=1, max_size=4)


@given(_SIZES, st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_reshape(source: list[int], data: st.DataObject) -> None:
    """Every factor that two shapes share can be cut, at any nesting."""
    left, target = prod(source), []
    while left > 1:
        target.append(data.draw(st.sampled_from([n for n in range(2, left + 1) if left % n == 0])))
        left //= target[-1]
    check_case(case(aten.reshape.default, randn(*source), target))
