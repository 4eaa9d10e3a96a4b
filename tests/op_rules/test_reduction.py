"""Reductions, norms, softmax, sorts."""

from __future__ import annotations

import pytest
import torch

from sptransform.op_rules import DEFAULT_RULES
from tests.support.brute_force import OUTER, Case, booleans, call_of, case, check_case, ids, positive, randn, rule_for

aten, sp = torch.ops.aten, torch.ops.sptransform

CASES = [
    case(aten._log_softmax.default, randn(4, 6), 1, False, factors="i0"),
    case(aten._softmax.default, randn(4, 6), -2, False, factors="i1"),
    case(aten._weight_norm.default, randn(4, 3, 5), randn(1, 1, 5), 2, factors="i2"),
    case(aten._weight_norm.default, randn(4, 3, 5), randn(4, 1, 1), factors="i0"),
    case(aten.all.default, booleans(4, 6), factors=""),
    case(aten.all.dim, booleans(4, 6), -1, factors="i0"),
    case(aten.amax.default, randn(4, 6), [1]),
    case(aten.amax.default, randn(4, 6), factors=""),
    case(aten.amax.default, randn(4, 5, 6), [0, -1], True, factors="i1"),
    case(aten.amin.default, randn(4, 6), [-2]),
    case(aten.any.default, booleans(4, 6)),
    case(aten.any.dim, booleans(4, 6), 0, True),
    case(aten.argmax.default, randn(4, 6), factors=""),
    case(aten.argmax.default, randn(4, 6), -1),
    case(aten.argmin.default, randn(4, 6), 0, True),
    case(aten.argsort.default, randn(4, 6), 0),
    case(aten.argsort.stable, randn(4, 6), stable=True, dim=0),
    Case(
        aten.batch_norm.default,
        (randn(2, 3, 4, 5), randn(3), randn(3), randn(3), positive(3), False, 0.1, 1e-5, False),
        factors="i0 i1 i2 i3",
        constant=("running_mean", "running_var"),
    ),
    Case(
        aten.batch_norm.default,
        (randn(4, 3), None, None, randn(3), positive(3), False, 0.1, 1e-5, False),
        constant=("running_mean", "running_var"),
    ),
    case(aten.flip.default, randn(4, 6, 5), [0, -1], factors="i1"),
    case(aten.glu.default, randn(4, 6), -1, factors="i0"),
    case(aten.roll.default, randn(4, 6, 5), [2, 1], [1, 2], factors="i0"),
    case(aten.layer_norm.default, randn(2, 4, 6), [6], randn(6), randn(6), factors="i0 i1"),
    case(aten.layer_norm.default, randn(2, 4, 6), [4, 6], randn(4, 6), randn(4, 6), factors="i0"),
    case(aten.layer_norm.default, randn(4, 1, 6), [1, 6], randn(1, 6), randn(1, 6), factors="i0"),
    case(aten.layer_norm.default, randn(4, 6), [6], None, randn(6)),
    case(aten.layer_norm.default, randn(4, 6), [6], randn(6)),
    case(aten.layer_norm.default, randn(4, 6), [6]),
    case(aten.log_softmax.int, randn(4, 6), -1),
    case(aten.logsumexp.default, randn(4, 6), [1]),
    case(aten.logsumexp.default, randn(4, 6), [-1], True),
    case(aten.logsumexp.default, randn(4, 5, 6), [0, 2], factors="i1"),
    case(aten.max.default, randn(4, 6)),
    case(aten.max.dim, randn(4, 6), 1),
    case(aten.max.dim, randn(4, 6), -2, True),
    case(aten.mean.default, randn(4, 6), factors="i0 i1"),
    case(aten.mean.default, randn(6)),
    case(aten.mean.default, randn()),
    case(aten.mean.dim, randn(4, 6), [1]),
    case(aten.mean.dim, randn(4, 5, 6), [0, -1], True, factors="i0 i1 i2"),
    case(aten.mean.dim, randn(4, 6), None),
    Case(aten.mean.dim, (randn(4, 6).float(), [0]), {"dtype": torch.float64}, tolerance=1e-6),
    case(aten.mean.dim, randn(4, 1), [1], factors="i0"),
    case(aten.min.default, randn(4, 6)),
    case(aten.min.dim, randn(4, 6), 0),
    case(aten.prod.default, positive(4, 6)),
    case(aten.rms_norm.default, randn(2, 4, 6), [6], randn(6), 1e-6, factors="i0 i1"),
    case(aten.rms_norm.default, randn(2, 4, 6), [6]),
    case(aten.rms_norm.default, randn(4, 6, 1), [6, 1], factors="i0"),
    case(aten.softmax.int, randn(4, 6), -1),
    case(aten.softmax.int, randn(4, 6), 0, torch.float64),
    case(aten.softmax.int, randn(4, 1), -1, factors="i0"),
    case(aten.sort.default, randn(4, 6)),
    case(aten.sort.default, randn(4, 6), 0, True),
    case(aten.sort.stable, randn(4, 6), stable=True),
    case(aten.std.correction, randn(4, 6), [1]),
    case(aten.sum.default, randn(4, 6), factors="i0 i1"),
    case(aten.sum.default, randn(1, 6)),
    case(aten.sum.dim_IntList, randn(4, 6), [0], factors="i0 i1"),
    case(aten.sum.dim_IntList, randn(4, 5, 6), [-1, 0], True),
    case(aten.sum.dim_IntList, randn(4, 6), []),
    case(aten.sum.dim_IntList, randn(4, 6), None, True),
    case(aten.sum.dim_IntList, booleans(4, 6), [1]),
    case(aten.topk.default, randn(4, 6), 2, factors="i0"),
    case(aten.topk.default, randn(4, 6), 1, 0, factors="i1"),
    case(aten.topk.default, randn(4, 6), 6),
    case(aten.topk.default, randn(4, 1), 1, factors="i0"),
    case(aten.tril.default, randn(3, 4, 6), factors="i0"),
    case(aten.tril.default, randn(4, 6), -1, factors=""),
    case(aten.tril.default, randn(3, 1, 6), factors="i0"),
    case(aten.triu.default, booleans(3, 4, 6), 1),
    case(aten.var.correction, randn(4, 6), [-1], correction=0, keepdim=True),
    case(aten.var.correction, randn(4, 6)),
    case(aten.var_mean.correction, randn(4, 6, 5), [0, 2], correction=0, keepdim=True, factors="i1"),
    # along a dimension cut over the mesh dim before
    Case(sp.joined_std.default, (randn(4, 3, 2), [1], True, 6, 1, 2, OUTER), factors="i0 i2", outer=2),
    Case(sp.joined_var.default, (randn(4, 3, 2), [1, 2], False, 12, 0, 2, OUTER), factors="i0", outer=2),
    Case(sp.joined_var_mean.default, (randn(4, 3), [0], True, 8, 0, 2, OUTER), factors="i1", outer=2),
    Case(sp.log_softmax.default, (randn(4, 3, 2), 1, torch.float64, 2, OUTER), factors="i0 i2", outer=2),
    Case(sp.logsumexp.default, (randn(4, 3, 2), 1, False, torch.float64, 2, OUTER), factors="i0 i2", outer=2),
    Case(sp.softmax.default, (randn(4, 3), -2, torch.float64, 2, OUTER), factors="i1", outer=2),
]


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_rule(case: Case) -> None:
    check_case(case)


def test_softmax_and_variances_join_what_must_be_whole() -> None:
    """Nothing else does; values are compared in ``tests/ops/test_joined_softmax.py`` and ``test_joined_moments.py``."""
    joining = {aten._log_softmax.default, aten._softmax.default, aten.log_softmax.int, aten.softmax.int}
    joining |= {aten.logsumexp.default, aten.std.correction, aten.var.correction, aten.var_mean.correction}
    for each in CASES:
        _, rule = rule_for(each)
        joins = each.target in joining and not (each.target is aten.logsumexp.default and len(each.args[1]) > 1)
        assert rule.self_reduced == (rule.replicated if joins else frozenset()), str(each)


def test_a_roll_of_the_flattened_tensor_has_no_rule() -> None:
    call, _, _ = call_of(case(aten.roll.default, randn(4, 6), [2]))
    assert DEFAULT_RULES.rule_of(call) is None
