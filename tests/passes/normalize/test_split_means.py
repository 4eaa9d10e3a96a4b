"""Means of losses as sum and count: the same value and gradient, in a form that shards add up to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from sptransform.capture.capture import capture
from sptransform.engine.pass_manager import run_passes
from sptransform.graph.printer import text
from sptransform.passes.normalize.split_means import SplitMeans
from tests.support.golden import Golden
from tests.support.graphs import a_context, after, captured, run_once, while_captured

PASS = (SplitMeans(),)
ROWS, CLASSES = 6, 5


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, labels)


def an_input() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits = torch.randn(ROWS, CLASSES, dtype=torch.float64, requires_grad=True)
    return logits, torch.tensor([0, 4, -100, 2, 3, -100])


def test_golden(golden: Golden) -> None:
    before, _ = captured(cross_entropy, *an_input())
    done, _ = after(PASS, cross_entropy, *an_input())
    golden.check("split_means", before=text(before.graph.nodes), after=text(done.graph.nodes))


def assert_same_meaning(model: Callable[..., torch.Tensor], *inputs: torch.Tensor, changed: bool = True) -> None:
    def both(gm: torch.fx.GraphModule, real: list[torch.Tensor]) -> None:
        plain, split = capture(gm, real), run_passes(capture(gm, real), PASS, a_context())
        assert (text(plain.graph.nodes) != text(split.graph.nodes)) == changed
        reference, found = run_once(gm, real), run_once(split, real)
        for x, y in zip(reference.outputs + reference.grads, found.outputs + found.grads, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                torch.testing.assert_close(y, x, rtol=1e-14, atol=1e-14)

    while_captured(model, both, *inputs)


WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [{}, {"ignore_index": 2}, {"weight": WEIGHT}, {"weight": WEIGHT, "ignore_index": 4}, {"label_smoothing": 0.1}],
    ids=str,
)
def test_cross_entropy(options: dict[str, object]) -> None:
    logits, labels = an_input()
    if "ignore_index" in options:
        labels = labels.clamp(min=0)
    assert_same_meaning(lambda x, y: functional.cross_entropy(x, y, **options), logits, labels)


def test_class_weights_with_label_smoothing() -> None:
    assert_same_meaning(lambda x, y: functional.cross_entropy(x, y, weight=WEIGHT, label_smoothing=0.1), *an_input())


def test_class_probabilities() -> None:
    logits, _ = an_input()
    target = torch.randn(ROWS, CLASSES, dtype=torch.float64).softmax(-1)
    assert_same_meaning(functional.cross_entropy, logits, target)


def test_trailing_dims() -> None:
    logits = torch.randn(2, CLASSES, 3, dtype=torch.float64, requires_grad=True)
    assert_same_meaning(functional.cross_entropy, logits, torch.randint(CLASSES, (2, 3)))
    assert_same_meaning(functional.cross_entropy, logits, torch.randn(2, CLASSES, 3, dtype=torch.float64).softmax(1))


def test_nll() -> None:
    assert_same_meaning(lambda x, y: functional.nll_loss(x.log_softmax(-1), y), *an_input())


@pytest.mark.parametrize(
    "loss",
    [functional.mse_loss, functional.l1_loss, functional.smooth_l1_loss, functional.huber_loss],
    ids=lambda loss: loss.__name__,
)
def test_elementwise_losses(loss: Callable[..., torch.Tensor]) -> None:
    x, _ = an_input()
    assert_same_meaning(lambda x, y: loss(x, y), x, torch.randn(ROWS, CLASSES, dtype=torch.float64))


def test_binary_cross_entropy_with_weights() -> None:
    x, _ = an_input()
    y = torch.rand(ROWS, CLASSES, dtype=torch.float64)
    assert_same_meaning(functional.binary_cross_entropy_with_logits, x, y)
    assert_same_meaning(
        lambda x, y: functional.binary_cross_entropy_with_logits(x, y, weight=WEIGHT, pos_weight=WEIGHT + 1.0), x, y
    )


def test_kl_divergence() -> None:
    x, _ = an_input()
    y = torch.rand(ROWS, CLASSES, dtype=torch.float64)
    assert_same_meaning(lambda x, y: functional.kl_div(x, y, reduction="mean"), x, y)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_other_reductions_stay(reduction: str) -> None:
    assert_same_meaning(lambda x, y: functional.cross_entropy(x, y, reduction=reduction), *an_input(), changed=False)


def test_no_label_at_all_is_nan_as_on_one_device() -> None:
    logits, labels = an_input()
    gm, _ = after(PASS, cross_entropy, logits, labels)
    assert gm(logits, torch.full_like(labels, -100))[0].isnan()
