"""Pointwise ops: those with a line of their own, and a sample of those the table's default answers for."""

from __future__ import annotations

import pytest
import torch

from sptransform.op_rules import DEFAULT_RULES, pointwise
from sptransform.ops.groups import pretend
from sptransform.ops.local_slice import local_slice_for
from sptransform.rules.decision import Sharded
from sptransform.rules.table import Local
from sptransform.sharding.partition import Partition
from sptransform.sharding.placement import Shard
from tests.support.brute_force import (
    GROUP,
    Case,
    booleans,
    call_of,
    case,
    check_case,
    emit,
    ids,
    integers,
    positive,
    randn,
    rule_for,
)

aten, sp = torch.ops.aten, torch.ops.sptransform

CASES = [
    case(aten.__and__.Tensor, booleans(4, 5), booleans(5), factors=".1 .2"),
    case(aten.__and__.Tensor, integers(8, 4, 1), integers(8, 1, 5)),
    case(aten.__or__.Tensor, booleans(4, 5), booleans(4, 1)),
    case(aten.__or__.Tensor, booleans(4, 1), booleans(3, 1, 5)),
    case(aten.add.Tensor, randn(4, 5), randn(4, 5)),
    case(aten.add.Tensor, randn(2, 4, 5), randn(5), alpha=3),
    case(aten.add.Tensor, randn(4, 1), randn(3, 1, 5), factors=".1 .2 .3"),
    case(aten.add.Tensor, randn(4, 5), 2.5),
    case(aten.add.Tensor, randn(4, 5), randn()),
    case(aten.alias.default, randn(4, 6)),
    case(aten.broadcast_tensors.default, [randn(4, 1, 6), randn(5, 1)], factors=".1 .2 .3"),
    case(aten.broadcast_tensors.default, [randn(4, 6), randn(4, 6)], factors=".1 .2"),
    case(aten.clone.default, randn(4, 1, 6), factors=".1 .3"),
    case(aten.contiguous.default, randn(6, 4).t()),
    case(aten.detach.default, randn(4, 6)),
    case(aten.div.Scalar, randn(4, 6), 3.0),
    case(aten.div.Tensor, randn(4, 6), positive(6)),
    case(aten.div.Tensor, randn(6), positive(4, 1)),
    case(aten.div.Tensor, randn(4, 6), 3.0),
    case(aten.dropout.default, randn(4, 6), 0.5, False),
    case(aten.dropout.default, randn(4, 6), 0.0, True),
    case(aten.dropout.default, randn(4, 6), 1.0, True),
    case(aten.floor_divide.Scalar, integers(9, 4, 6), 2),
    case(aten.floor_divide.default, integers(9, 4, 6), 2),
    case(aten.gelu.default, randn(4, 6)),
    case(aten.gelu.default, randn(4, 6), approximate="tanh"),
    case(aten.hardswish.default, 4 * randn(4, 6)),
    case(aten.leaky_relu.default, randn(4, 6)),
    case(aten.log_sigmoid.default, randn(4, 6)),
    case(aten.lift_fresh_copy.default, randn(4, 6)),
    case(aten.mul.Scalar, randn(4, 6), 3.0),
    case(aten.mul.Tensor, randn(2, 4, 6), randn(4, 1)),
    case(aten.mul.Tensor, randn(6), randn(4, 6)),
    case(aten.mul.Tensor, randn(4, 6), 3.0),
    case(aten.neg.default, randn(4, 6)),
    case(aten.rsub.Tensor, randn(4, 6), randn(6), alpha=2),
    case(aten.selu.default, randn(4, 6)),
    case(
        sp.normalized.default, randn(4, 3, 6), randn(1, 3, 1), positive(1, 3, 1), randn(3, 1), randn(3, 1), 1e-5,
        factors=".1 .2 .3",
    ),
    case(sp.normalized.default, randn(4, 2, 3, 6), randn(4, 2, 1, 1), positive(4, 2, 1, 1), None, None, 1e-5),
    case(aten.sub.Tensor, randn(4, 6), randn(6), alpha=2),
    case(aten.sub.Tensor, randn(6), randn(4, 1)),
    case(aten.sub.Tensor, randn(4, 6), 1.0),
    case(aten.to.device, randn(4, 6), "cpu", torch.float32),
    case(aten.to.dtype, randn(4, 6), torch.float32),
    case(aten.to.dtype, integers(5, 4, 6), torch.float64),
    case(aten.to.dtype_layout, randn(4, 6), dtype=torch.float32),
    case(aten.to.other, randn(4, 6), randn(4, 6).float()),
    case(aten.to.other, randn(4, 6), randn(7).float(), factors=".1 .2"),
    case(aten.to.other, randn(6), randn(4, 6).float()),
    case(aten.to.other, randn(2, 4), randn(2, 1).float(), factors=".1 .2"),
    case(aten.where.Scalar, booleans(4, 5), 1.0, 2.0, factors=".1 .2"),
    case(aten.where.ScalarOther, booleans(4, 1), randn(4, 5), 2.0, factors=".1 .2"),
    case(aten.where.ScalarSelf, booleans(5), 2.0, randn(4, 5), factors=".1 .2"),
    case(aten.type_as.default, randn(4, 6), integers(3, 6)),
    case(aten.type_as.default, randn(4, 6), randn().float()),
    case(aten.type_as.default, randn(6), randn(2, 3, 4).float(), factors=".1"),
    case(torch.ops.sptransform.before_write.default, randn(4, 6)),
    case(torch.ops.sptransform.with_value.default, randn(4, 6), randn(4, 6).cos()),
]

# the default: whatever torch tags as pointwise
DEFAULTS = [
    case(aten.abs.default, randn(4, 6)),
    case(aten.add.Scalar, randn(4, 6), 2.0),
    case(aten.addcmul.default, randn(4, 6), randn(6), randn(4, 1), value=2),
    case(aten.atan2.default, randn(4, 6), positive(6)),
    case(aten.bitwise_and.Tensor, booleans(4, 6), booleans(6)),
    case(aten.bitwise_not.default, booleans(4, 6)),
    case(aten.bitwise_or.Tensor, booleans(4, 1), booleans(6)),
    case(aten.clamp.Tensor, randn(4, 6), randn(6) - 1, randn(4, 1) + 1),
    case(aten.clamp.default, randn(4, 6), -0.5, 0.5),
    case(aten.clamp_min.default, randn(4, 6), 0.1),
    case(aten.cos.default, randn(4, 6)),
    case(aten.div.Tensor_mode, integers(9, 4, 6), 2, rounding_mode="floor"),
    case(aten.eq.Scalar, integers(3, 4, 6), 1),
    case(aten.eq.Tensor, integers(3, 4, 1), integers(3, 6)),
    case(aten.erf.default, randn(4, 6)),
    case(aten.exp.default, randn(4, 6)),
    case(aten.ge.Tensor, integers(6, 4, 1), integers(6, 6)),
    case(aten.le.Tensor, integers(6, 4, 1), integers(6, 6)),
    case(aten.log.default, positive(4, 6)),
    case(aten.logical_and.default, booleans(4, 6), booleans(6)),
    case(aten.logical_not.default, booleans(4, 6)),
    case(aten.lt.Scalar, randn(4, 6), 0.0),
    case(aten.masked_fill.Scalar, randn(4, 6), booleans(6), 9.0),
    case(aten.maximum.default, randn(4, 6), randn(6)),
    case(aten.ne.Scalar, integers(3, 4, 6), 1),
    case(aten.pow.Scalar, 2.0, randn(4, 6)),
    case(aten.pow.Tensor_Scalar, randn(4, 6), 2),
    case(aten.pow.Tensor_Tensor, positive(4, 6), randn(6)),
    case(aten.reciprocal.default, positive(4, 6)),
    case(aten.relu.default, randn(4, 6)),
    case(aten.rsqrt.default, positive(4, 6)),
    case(aten.rsub.Scalar, randn(4, 6), 1.0),
    case(aten.sigmoid.default, randn(4, 6)),
    case(aten.silu.default, randn(4, 6)),
    case(aten.sin.default, randn(4, 6)),
    case(aten.softplus.default, randn(4, 6)),
    case(aten.sqrt.default, positive(4, 6)),
    case(aten.tanh.default, randn(4, 6)),
    case(aten.where.self, booleans(4, 1), randn(6), randn(3, 4, 6)),
]


@pytest.mark.parametrize("case", CASES + DEFAULTS, ids=ids(CASES + DEFAULTS))
def test_rule(case: Case) -> None:
    check_case(case)


@pytest.mark.parametrize("target", [case.target for case in DEFAULTS], ids=str)
def test_the_default_answers(target: torch._ops.OpOverload) -> None:
    assert target not in dict(pointwise.TABLE)
    assert pointwise.default_entry(target) is not None


@pytest.mark.parametrize("target", [aten.bernoulli.default, aten.rand_like.default, aten.native_dropout.default])
def test_random_numbers_are_not_pointwise(target: torch._ops.OpOverload) -> None:
    assert DEFAULT_RULES.get(target) is None


@pytest.mark.parametrize("target", [aten.to.other, aten.type_as.default], ids=str)
def test_nothing_is_gathered_to_read_a_dtype(target: torch._ops.OpOverload) -> None:
    """Where shapes agree, the operand read for its dtype may be cut like the other; elsewhere it shares no factor."""
    _, rule = rule_for(case(target, randn(4, 1, 6), randn(2, 4, 3, 6).float()))
    assert rule.operands[1][1] == rule.operands[0][0] and rule.operands[1][3] == rule.operands[0][2]
    assert {f for factors in (rule.operands[1][0], rule.operands[1][2]) for f in factors} == rule.replicated


def test_dropout_draws_a_mask_for_each_rank_and_keeps_generators_in_step() -> None:
    call, (x,), _ = call_of(case(aten.dropout.default, randn(8, 64), 0.25, True))
    rule = DEFAULT_RULES.rule_of(call)
    decision = Sharded(rule.results[0][0][0], Partition.contiguous(8, 3))
    parts, states = [], []
    for rank in range(3):
        torch.manual_seed(3)
        part = local_slice_for(x.detach(), Shard(0, decision.partition), rank)
        shapes = (tuple(part.shape),)
        local = Local(emit, (part,), shapes, shapes, (part.dtype,), rule, decision, rank, GROUP)
        with pretend(GROUP, rank):
            dropped = DEFAULT_RULES[call.target].localize(call, local)
        kept = dropped != 0
        torch.testing.assert_close(dropped[kept], part[kept] / 0.75)
        assert 0.5 < kept.double().mean() < 0.95
        parts.append(kept)
        states.append(torch.get_rng_state())
    assert not torch.equal(parts[0], parts[1])
    assert torch.equal(states[0], states[1]) and torch.equal(states[1], states[2])
