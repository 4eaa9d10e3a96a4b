"""Slices, single entries, splits, concatenation, padding."""

from __future__ import annotations

import pytest
import torch

from sptransform.op_rules import DEFAULT_RULES
from sptransform.op_rules.pieces import _split_local
from sptransform.ops.local_slice import local_slice_for
from sptransform.rules.decision import Sharded
from sptransform.rules.table import Local
from sptransform.sharding.partition import Partition
from sptransform.sharding.placement import Shard
from tests.support.brute_force import Case, call_of, case, check_case, emit, ids, integers, randn, rule_for

aten = torch.ops.aten
END = 2**63 - 1

CASES = [
    case(aten.cat.default, [randn(4, 2), randn(4, 3)], 1, factors="i0 i1"),
    case(aten.cat.default, [randn(4, 2), randn(4, 1), randn(4, 2)], -1, factors="i0 i1"),
    case(aten.cat.default, [randn(1, 5), randn(1, 5)], factors="i0 i1"),
    case(aten.cat.default, [randn(4, 6)], 1, factors="i0 i1"),
    case(aten.cat.default, [randn(4, 0), randn(4, 3)], 1),
    case(aten.cat.default, [randn(4, 1), randn(4, 0)], 1, factors="i0"),
    case(aten.cat.default, [randn(1, 6), randn(4, 6)], factors="i0 i1"),
    case(aten.chunk.default, randn(4, 6), 2, -1, factors="i0 i1"),
    case(aten.chunk.default, randn(5, 6), 2),
    case(aten.concatenate.default, [randn(4, 6), randn(4, 3)], 1, factors="i0 i1"),
    case(aten.concatenate.default, [randn(4, 1), randn(4, 3)], 1, factors="i0 i1"),
    case(aten.constant_pad_nd.default, randn(4, 6), [1, 2], 3.0, factors="i0 i1"),
    case(aten.constant_pad_nd.default, randn(4, 6), [0, 0, 2, 0]),
    case(aten.constant_pad_nd.default, randn(7, 6), [0, -2, -3, 0], factors="i0 i1"),
    case(aten.pad.default, randn(4, 6), [0, 1], value=-100.0, factors="i0 i1"),
    case(aten.pad.default, integers(9, 2, 6), [0, 1], value=-100),
    case(aten.pad.default, randn(4, 6), [2, 0, 0, 3], "constant", 1.5),
    case(aten.pad.default, randn(7, 6), [-1, 1, 1, -1], factors="i0 i1"),
    case(aten.pad.default, randn(4, 6), [0, 0]),
    case(aten.pad.default, randn(4, 1), [0, 3], factors="i0"),
    case(aten.pad.default, randn(4, 6, 2), [-1, 0, 1, 0], factors="i0 i1"),
    case(aten.select.int, randn(4, 6), 1, -1, factors="i0 i1"),
    case(aten.select.int, randn(4, 6), -2, 2, factors="i0 i1"),
    case(aten.select.int, randn(4, 1), 1, 0, factors="i0"),
    case(aten.slice.Tensor, randn(2, 6), 1, 0, -1, factors="i0 i1"),
    case(aten.slice.Tensor, randn(2, 6), -1, 1, END, factors="i0 i1"),
    case(aten.slice.Tensor, randn(2, 9), 1, 2, 7),
    case(aten.slice.Tensor, randn(6, 4), 0, -2, None),
    case(aten.slice.Tensor, randn(6, 4), 0, 5, END),
    case(aten.slice.Tensor, randn(6, 4)),
    case(aten.slice.Tensor, randn(6, 4), 1, 0, 100),
    case(aten.slice.Tensor, randn(6, 4), 0, 0, END, 2, factors="i1"),
    case(aten.slice.Tensor, randn(1, 4), 0, 0, 1, factors="i1"),
    case(aten.slice.Tensor, randn(1, 4), 0, 0, 0, factors="i1"),
    case(aten.split.Tensor, randn(4, 6), 2, 1, factors="i0 i1"),
    case(aten.split.Tensor, randn(5, 6), 2, -2, factors="i0 i1"),
    case(aten.split_with_sizes.default, randn(4, 6), [1, 2, 3], -1, factors="i0 i1"),
    case(aten.split_with_sizes.default, randn(7, 3), [1, 1, 5], 0, factors="i0 i1"),
    case(aten.split_with_sizes.default, randn(4, 2), [1, 1], 1, factors="i0"),
    case(aten.split_with_sizes.default, randn(4, 12), [6, 2, 4], -1, factors="i0 i1"),
    case(aten.split_with_sizes.default, randn(2, 7, 3), [2, 0, 5], 1, factors="i0 i1 i2"),
    case(aten.split_with_sizes.default, randn(4, 6), [0, 6], 1),
    case(aten.stack.default, [randn(4, 6), randn(4, 6)], 1),
    case(aten.stack.default, [randn(4, 6)], -1),
    case(aten.stack.default, [randn(4), randn(4), randn(4)], factors="i1"),
    case(aten.unbind.int, randn(4, 3, 2), 1, factors="i0 i2"),
    case(aten.unbind.int, randn(2, 6)),
]


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_rule(case: Case) -> None:
    check_case(case)


NO_RULE = [
    case(aten.cat.default, [randn(0), randn(4, 3)], 1),
    case(aten.pad.default, randn(2, 3, 6), [1, 1], "reflect"),
]


@pytest.mark.parametrize("case", NO_RULE, ids=ids(NO_RULE))
def test_no_rule(case: Case) -> None:
    call, _, _ = call_of(case)
    assert DEFAULT_RULES.rule_of(call) is None


def test_a_fused_projection_is_cut_in_every_piece() -> None:
    """Four query heads and two key heads of four, side by side: who owns a head owns it in its piece."""
    call, rule = rule_for(case(aten.split_with_sizes.default, randn(3, 32), [16, 8, 8], 1))
    fused = Partition.of(32, [[(0, 8), (16, 20), (24, 28)], [(8, 16), (20, 24), (28, 32)]])
    query, key, value = Sharded("i1", fused).outcomes(rule, 3)
    assert query == Shard(1, Partition.contiguous(16, 2))
    assert key == value == Shard(1, Partition.contiguous(8, 2))
    # and when both ranks share the one key head
    shared = Partition.of(24, [[(0, 8), (16, 20), (20, 24)], [(8, 16), (16, 20), (20, 24)]])
    call, rule = rule_for(case(aten.split_with_sizes.default, randn(3, 24), [16, 4, 4], 1))
    x = randn(3, 24)
    for rank in range(2):
        decision = Sharded("i1", shared)
        part = local_slice_for(x, Shard(1, shared), rank)
        local = Local(emit, (part,), (), (), (), rule, decision, rank, "group")
        for piece, whole, placement in zip(
            _split_local(call, local), x.split([16, 4, 4], 1), decision.outcomes(rule, 3), strict=True
        ):
            assert torch.equal(piece, local_slice_for(whole, placement, rank))
