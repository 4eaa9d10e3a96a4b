"""Rules of custom autograd.Functions, derived from the graphs of both their directions."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from sptransform.engine.bodies import rule_of_body
from sptransform.op_rules import DEFAULT_RULES
from sptransform.rules.rule import OpRule

S, H = 6, 4  # no size twice, or names would say nothing

ROW = "operands(%0); {}; results(%1); given(%2); %3 = aten.neg.default(%2); gradients(%3)"
SCALED = "operands(%0, %1); %2 = aten.mul.Tensor(%0, %1); results(%2); given(%3); "


def rule_of(body: str, *shapes: Sequence[int], results: int = 1) -> OpRule:
    graph, mode = fx.Graph(), FakeTensorMode()
    operands = [graph.placeholder(f"x{i}") for i in range(len(shapes))]
    with mode:
        for node, shape in zip(operands, shapes, strict=True):
            node.meta["val"] = torch.empty(shape)
        node = graph.call_function(
            torch.ops.sptransform.autograd_function.default, ("F", operands, [], body, [])
        )
        node.meta["val"] = [torch.empty(shapes[0]) for _ in range(results)]
    return rule_of_body(node, DEFAULT_RULES)


def free(rule: OpRule) -> set[int]:
    """The sizes of the factors that may be cut."""
    return {rule.sizes[name] for name in rule.sizes if name not in rule.replicated}


@pytest.mark.parametrize(
    ("body", "shapes", "cut"),
    [
        (ROW.format("%1 = aten.exp.default(%0)"), [(S, H)], {S, H}),
        (ROW.format("%1 = aten._softmax.default(%0, 1, False)"), [(S, H)], {S}),
        (ROW.format("%1 = aten.cumsum.default(%0, 0)"), [(S, H)], {H}),
        (ROW.format("%1 = aten.roll.default(%0, [1], [1])"), [(S, H)], {S}),
        (ROW.format("%1 = aten.logcumsumexp.default(%0, 1)"), [(S, H)], set()),  # no rule
        # of sizes; in another order; of positions
        (ROW.format(f"%4 = aten.ones.default([{S}, 1]); %1 = aten.mul.Tensor(%0, %4)"), [(S, H)], {S, H}),
        (ROW.format(f"%4 = aten.reshape.default(%0, [{S * H}]); %1 = aten.reshape.default(%4, [{S}, {H}])"), [(S, H)],
         {S, H}),
        (ROW.format(f"%4 = aten.arange.default({H}); %1 = aten.mul.Tensor(%0, %4)"), [(S, H)], {S}),
        # the gradient of a weight: summed, summed too late, not summed, passed through what is not linear
        (SCALED + "%4 = aten.mul.Tensor(%3, %1); %5 = aten.mul.Tensor(%3, %0); %6 = aten.sum.dim_IntList(%5, [0]); "
         "gradients(%4, %6)", [(S, H), (H,)], {S, H}),
        (SCALED + "%4 = aten.sum.dim_IntList(%3, [0]); %5 = aten.abs.default(%4); gradients(%3, %5)",
         [(S, H), (H,)], {H}),
        (SCALED + "%4 = aten.sum.dim_IntList(%3, [0]); %5 = aten._to_copy.default(%4, dtype=torch.float64); "
         "gradients(%3, %5)", [(S, H), (H,)], {S, H}),
        (SCALED + "%4 = aten.sum.dim_IntList(%3, [0]); %5 = aten._to_copy.default(%4, dtype=torch.int64); "
         "gradients(%3, %5)", [(S, H), (H,)], {H}),
        (SCALED + "%4 = aten.sum.dim_IntList(%3, [0]); %5 = aten.add.Tensor(%4, %1); gradients(%3, %5)",
         [(S, H), (H,)], {H}),
        (SCALED + "%4 = aten.abs.default(%1); gradients(%3, %4)", [(S, H), (H,)], {H}),
        # rows go through the forward alone
        ("operands(%0); %1 = aten.exp.default(%0); results(%1); given(%2); %3 = aten.sum.dim_IntList(%2, [0], True); "
         "%4 = aten.sub.Tensor(%2, %3); gradients(%4)", [(S, H)], {H}),
        # what was written is not known
        (ROW.format("%1 = aten.exp.default(%0); %4 = aten.relu_.default(%1)"), [(S, H)], set()),
    ],
)  # fmt: skip
def test_an_axis_is_cut_if_it_goes_through_both_directions(body: str, shapes: list, cut: set[int]) -> None:
    assert free(rule_of(body, *shapes)) == cut


def test_a_sum_over_the_axis_is_pending_if_the_backward_needs_no_other_rank() -> None:
    total = "operands(%0); %1 = aten.sum.default(%0); results(%1); given(%2); "
    rule = rule_of(total + f"%3 = aten.expand.default(%2, [{S}, {H}]); gradients(%3)", (S, H))
    assert free(rule) == {S, H} == {rule.sizes[name] for name in rule.reduce}
    mean = total.replace("sum", "mean") + f"%3 = aten.expand.default(%2, [{S}, {H}]); gradients(%3)"
    assert free(rule_of(mean, (S, H))) == {S, H}
    squared = total.replace("%0); results(%1)", "%0); %4 = aten.pow.Tensor_Scalar(%1, 2); results(%4)")
    assert free(rule_of(squared + f"%3 = aten.expand.default(%2, [{S}, {H}]); gradients(%3)", (S, H))) == set()


def test_an_axis_that_a_tensor_has_twice_is_whole() -> None:
    body = "operands(%0); %1 = aten.t.default(%0); %2 = aten.add.Tensor(%0, %1); results(%2); given(%3); gradients(%3)"
    assert free(rule_of(body, (S, S))) == set()


@pytest.mark.parametrize(("op", "is_whole"), [("neg", False), ("sign", True)])
def test_a_backward_that_is_not_linear_takes_whole_gradients(op: str, is_whole: bool) -> None:
    body = f"operands(%0); %1 = aten.exp.default(%0); results(%1); given(%2); %3 = aten.{op}.default(%2); gradients(%3)"
    assert rule_of(body, (S, H)).whole_gradient is is_whole
