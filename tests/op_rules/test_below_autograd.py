"""Ops that others are made of below autograd, and derivatives."""

from __future__ import annotations

import pytest
import torch

from sptransform.op_rules import DEFAULT_RULES
from tests.support.brute_force import Case, booleans, call_of, case, check_case, ids, positive, randn

aten = torch.ops.aten

NORMED = (randn(2, 4, 6), randn(2, 4, 6), [6], randn(2, 4, 1), positive(2, 4, 1), randn(6), randn(6))

CASES = [
    case(aten._log_softmax_backward_data.default, randn(4, 6), randn(4, 6), 1, torch.float64, factors="i0"),
    case(aten._softmax_backward_data.default, randn(4, 6), randn(4, 6), -2, torch.float64, factors="i1"),
    case(aten._to_copy.default, randn(4, 6), factors=".1 .2"),
    case(aten.elu_backward.default, randn(4, 6), 1.0, 1.0, 1.0, False, randn(4, 6)),
    case(aten.hardtanh_backward.default, randn(4, 6), randn(4, 6), -0.5, 0.5),
    case(aten.leaky_relu_backward.default, randn(4, 6), randn(4, 6), 0.1, False),
    case(aten.linalg_vector_norm.default, randn(4, 6), 2, [1], True, factors="i0"),
    case(aten.linalg_vector_norm.default, randn(4, 6), factors=""),
    case(aten.masked_fill.Tensor, randn(4, 6), booleans(6), randn()),
    case(aten.native_layer_norm.default, randn(2, 4, 6), [6], randn(6), randn(6), 1e-5, factors="i0 i1"),
    case(aten.native_layer_norm.default, randn(4, 6), [4, 6], None, None, 1e-5, factors=""),
    Case(aten.native_layer_norm_backward.default, (*NORMED, [True] * 3), factors="i0 i1", constant=("mean", "rstd")),
    case(aten.norm.ScalarOpt_dim, randn(4, 6), 2, [-1], factors="i0"),
    case(aten.softplus_backward.default, randn(4, 6), randn(4, 6), 1.0, 20.0),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_rule(case: Case) -> None:
    check_case(case)


def test_a_derivative_that_leaves_out_a_result_has_no_rule() -> None:
    wanted = [True, False, False]
    made, _, _ = call_of(Case(aten.native_layer_norm_backward.default, (*NORMED, wanted), constant=("mean", "rstd")))
    assert DEFAULT_RULES.rule_of(made) is None
