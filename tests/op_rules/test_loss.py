"""Losses with reduction "none" and "sum"; a mean has a rule that shards nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sptransform.op_rules.loss import MEAN, NONE, SUM
from tests.support.brute_force import Case, booleans, case, check_case, ids, integers, positive, randn

aten = torch.ops.aten
cross_entropy = aten.cross_entropy_loss.default
joint = torch.ops.sptransform.linear_cross_entropy.default
# class 4 is masked; a softcap before that
PADDED = torch.tensor([False, False, False, False, True])
HIDDEN = "%2 = masked_fill.Scalar(%0, %1, -inf)"
CAPPED = "%2 = tanh(%0); %3 = mul.Tensor(%2, 2.0); %4 = masked_fill.Scalar(%3, %1, -1e9)"


def labels(num_classes: int, *shape: int) -> Tensor:
    """Class indices, some of them ignored."""
    return integers(num_classes, *shape).masked_fill(booleans(*shape), -100)


def log_probabilities(*shape: int) -> Tensor:
    return randn(*shape).log_softmax(1 if len(shape) > 1 else 0)


def impossible(*shape: int) -> Tensor:
    """Log-probabilities, every other one of a class that has no chance."""
    found = log_probabilities(*shape)
    found[:, ::2] = -torch.inf
    return found


CASES = [
    case(aten.binary_cross_entropy_with_logits.default, randn(4, 6), positive(4, 6), None, None, SUM),
    case(aten.binary_cross_entropy_with_logits.default, randn(4, 6), positive(4, 6), positive(4, 1), positive(6), SUM),
    case(aten.binary_cross_entropy_with_logits.default, randn(4, 6), positive(4, 6), None, positive(6), NONE),
    case(aten.binary_cross_entropy_with_logits.default, randn(4, 6), positive(4, 6), factors=""),
    case(cross_entropy, randn(6, 5), labels(5, 6), None, SUM, factors="n"),
    case(cross_entropy, randn(6, 5), labels(5, 6), None, NONE, factors="n"),
    case(cross_entropy, randn(6, 5), labels(5, 6), None, MEAN, factors=""),
    case(cross_entropy, randn(6, 5), labels(5, 6), positive(5), SUM, factors="n"),
    case(cross_entropy, randn(6, 5), labels(5, 6), positive(5), SUM, -100, 0.1),
    case(cross_entropy, randn(6, 5), labels(5, 6), positive(5), NONE, -100, 0.1),
    case(cross_entropy, randn(6, 5), integers(5, 6), None, SUM, 2, 0.1),
    case(cross_entropy, randn(6, 5), randn(6, 5).softmax(1), None, SUM, factors="n"),
    case(cross_entropy, randn(6, 5), randn(6, 5).softmax(1), positive(5), NONE, -100, 0.1),
    case(cross_entropy, randn(2, 5, 6), labels(5, 2, 6), None, SUM, factors="n d0"),
    case(cross_entropy, randn(2, 5, 6), labels(5, 2, 6), positive(5), NONE, factors="n d0"),
    case(cross_entropy, randn(2, 5, 3, 4), labels(5, 2, 3, 4), None, SUM, -100, 0.2, factors="n d0 d1"),
    case(cross_entropy, randn(2, 5, 4), randn(2, 5, 4).softmax(1), None, SUM, factors="n d0"),
    case(cross_entropy, randn(1, 5, 4), labels(5, 1, 4), None, SUM, factors="d0"),
    case(cross_entropy, randn(5), integers(5), None, SUM, factors=""),
    case(cross_entropy, randn(5), randn(5).softmax(0), None, SUM, factors=""),
    case(aten.huber_loss.default, randn(4, 6), randn(4, 6), SUM, 0.5),
    case(aten.huber_loss.default, randn(4, 6), randn(4, 6), NONE),
    case(aten.kl_div.default, log_probabilities(4, 6), positive(4, 6), SUM),
    case(aten.kl_div.default, log_probabilities(4, 6), log_probabilities(4, 6), NONE, log_target=True),
    case(aten.l1_loss.default, randn(4, 6), randn(4, 6), SUM),
    case(aten.l1_loss.default, randn(4, 6), randn(6), SUM),
    case(aten.l1_loss.default, randn(4, 6), randn(4, 1), NONE),
    case(aten.mse_loss.default, randn(4, 6), randn(4, 6), SUM, factors="i0 i1"),
    case(aten.mse_loss.default, randn(4, 6), randn(4, 6), NONE),
    case(aten.mse_loss.default, randn(4, 6), randn(4, 6), factors=""),
    case(aten.nll_loss_nd.default, log_probabilities(6, 5), labels(5, 6), None, SUM, factors="n c"),
    case(aten.nll_loss_nd.default, log_probabilities(6, 5), labels(5, 6), positive(5), NONE, factors="n c"),
    case(aten.nll_loss_nd.default, log_probabilities(6, 5), labels(5, 6), None, MEAN, factors=""),
    case(aten.nll_loss_nd.default, log_probabilities(6, 5), integers(5, 6), positive(5), SUM, 2),
    case(aten.nll_loss_nd.default, impossible(6, 5), torch.tensor([0, 1, 2, 3, 4, -100]), None, NONE),
    case(aten.nll_loss_nd.default, log_probabilities(2, 5, 3, 4), labels(5, 2, 3, 4), None, NONE, factors="n c d0 d1"),
    case(aten.nll_loss_nd.default, log_probabilities(2, 5, 6), labels(5, 2, 6), positive(5), SUM),
    case(aten.nll_loss_nd.default, log_probabilities(5), integers(5), positive(5), SUM, factors="c"),
    case(aten.smooth_l1_loss.default, randn(4, 6), randn(4, 6), SUM, 0.5),
    case(aten.smooth_l1_loss.default, randn(4, 6), randn(4, 6), NONE),
    case(joint, randn(4, 2, 3), randn(5, 3), labels(5, 4, 2), None, [], chunk=3, factors=".1 .2"),
    case(joint, randn(6, 3), randn(5, 3), labels(5, 6), randn(5), [], chunk=6, label_smoothing=0.1, factors=".1"),
    case(joint, randn(6, 3), randn(5, 3), integers(5, 6), None, [PADDED], chunk=4, program=CAPPED, ignore_index=2),
    # a rank's classes are all masked
    case(joint, randn(4, 3), randn(2, 3), torch.tensor([0, 0, -100, 0]), None, [PADDED[3:]], chunk=3, program=HIDDEN),
]


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_rule(case: Case) -> None:
    check_case(case)
