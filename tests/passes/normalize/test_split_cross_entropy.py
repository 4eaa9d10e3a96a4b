"""Cross-entropy as log-probabilities and a lookup: the same value and gradients, in a form whose classes can be cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sptransform import MegatronSP
from sptransform.capture.capture import capture
from sptransform.engine.pass_manager import run_passes
from sptransform.graph.printer import text
from sptransform.passes.normalize.split_cross_entropy import SplitCrossEntropy
from sptransform.passes.normalize.split_means import SplitMeans
from tests.passes.blocks import HIDDEN, Attention, hidden_states
from tests.support.golden import Golden
from tests.support.graphs import (
    a_context,
    after,
    assert_ranks_equal_one_device,
    captured,
    nodes_of,
    on_ranks,
    run_once,
    while_captured,
)
from tests.support.tiers import tiered

aten = torch.ops.aten
PASS = (SplitCrossEntropy(),)
ROWS, CLASSES = 6, 5
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0], dtype=torch.float64)


def an_input() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    logits = torch.randn(ROWS, CLASSES, dtype=torch.float64, requires_grad=True)
    return logits, torch.tensor([0, 4, -100, 2, 3, -100])


def probabilities(*shape: int) -> Tensor:
    """That ask for their gradient."""
    return torch.randn(shape, dtype=torch.float64).softmax(min(len(shape) - 1, 1)).requires_grad_()


def megatron(**options: Any) -> Any:
    return a_context(strategy=MegatronSP(), **options)


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, reduction="sum")


def test_golden(golden: Golden) -> None:
    before, _ = captured(summed, *an_input())
    done, _ = after(PASS, summed, *an_input(), context=megatron())
    golden.check("split_cross_entropy", before=text(before.graph.nodes), after=text(done.graph.nodes))


def assert_same_meaning(model: Callable[..., Tensor], *inputs: Tensor, tolerance: float = 1e-14) -> None:
    """The mean too, after the pass that runs before."""

    def both(gm: torch.fx.GraphModule, real: list[Tensor]) -> None:
        split = run_passes(capture(gm, real), (SplitMeans(), *PASS), megatron())
        assert nodes_of(split, aten.log_softmax.int) and not nodes_of(split, aten.cross_entropy_loss.default)
        reference, found = run_once(gm, real), run_once(split, real)
        for x, y in zip(reference.outputs + reference.grads, found.outputs + found.grads, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                torch.testing.assert_close(y, x, rtol=tolerance, atol=tolerance, equal_nan=True)

    while_captured(model, both, *inputs)


REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "sum", "mean"])


@pytest.mark.covering(ways=2)
@REDUCTIONS
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["", "weighted"])
@pytest.mark.parametrize("ignored", [-100, 2])
def test_class_indices(reduction: str, smoothing: float, weight: Tensor | None, ignored: int) -> None:
    logits, labels = an_input()
    labels = labels if ignored < 0 else labels.clamp(min=0)
    options = {"reduction": reduction, "label_smoothing": smoothing, "weight": weight, "ignore_index": ignored}
    assert_same_meaning(lambda x, y: functional.cross_entropy(x, y, **options), logits, labels)


@pytest.mark.covering(ways=1)
@REDUCTIONS
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["", "weighted"])
def test_class_probabilities(reduction: str, smoothing: float, weight: Tensor | None) -> None:
    options = {"reduction": reduction, "label_smoothing": smoothing, "weight": weight}
    logits, _ = an_input()
    assert_same_meaning(lambda x, y: functional.cross_entropy(x, y, **options), logits, probabilities(ROWS, CLASSES))


@pytest.mark.covering(ways=2)
@REDUCTIONS
@pytest.mark.parametrize("shape", [(CLASSES,), (2, CLASSES, 3), (2, CLASSES, 3, 4)], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_other_numbers_of_dims(reduction: str, shape: tuple[int, ...], smoothing: float) -> None:
    options = {"reduction": reduction, "label_smoothing": smoothing, "weight": WEIGHT}
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(CLASSES, () if len(shape) == 1 else (shape[0], *shape[2:]))
    for target in (labels, probabilities(*shape)):
        assert_same_meaning(lambda x, y: functional.cross_entropy(x, y, **options), logits, target)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_class_without_a_chance(smoothing: float) -> None:
    """Smoothed, its infinite loss reaches the labels that count and no others."""
    logits, labels = an_input()
    logits.data[::2, 1] = -torch.inf
    options = {"reduction": "none", "label_smoothing": smoothing}
    assert_same_meaning(lambda x, y: functional.cross_entropy(x, y, **options), logits, labels)


@pytest.mark.covering(ways=1)
@REDUCTIONS
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"weight": WEIGHT.bfloat16()}], ids=["plain", "smoothed", "weighted"]
)
def test_autocast(reduction: str, options: dict[str, Any]) -> None:
    """Autocast computes the loss in float32, whatever the logits: log-probabilities of 16 bits would be off by 1e-2."""

    def model(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return functional.cross_entropy(x, y, reduction=reduction, **options)

    logits, labels = an_input()
    for target in (labels, probabilities(ROWS, CLASSES)):
        assert_same_meaning(model, logits.detach().bfloat16().requires_grad_(), target, tolerance=1e-6)


def test_sixteen_bits() -> None:
    logits, labels = an_input()
    x = logits.detach().bfloat16().requires_grad_()
    assert_same_meaning(lambda x, y: functional.cross_entropy(x, y, reduction="none"), x, labels, tolerance=0.0)


def test_only_where_weights_are_cut() -> None:
    gm, _ = after(PASS, summed, *an_input())
    assert nodes_of(gm, aten.cross_entropy_loss.default)


def test_means_are_split_first() -> None:
    gm, _ = after(PASS, functional.cross_entropy, *an_input(), context=megatron())
    assert nodes_of(gm, aten.cross_entropy_loss.default)


class Head(nn.Module):
    """Attention and a loss over ``num_classes`` of every token."""

    def __init__(self, num_classes: int, **options: Any) -> None:
        super().__init__()
        self.attention, self.head = Attention(), nn.Linear(HIDDEN, num_classes, dtype=torch.float64)
        self.options = options

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(self.head(self.attention(x)).flatten(0, 1), target, **self.options)


@pytest.mark.parametrize(
    ("num_classes", "kind", "reduction", "smoothing", "is_weighted"),
    tiered(
        [
            (12, "indices", "sum", 0.0, False),
            (13, "indices", "mean", 0.1, True),
            (13, "indices", "none", 0.1, False),
            (13, "probabilities", "mean", 0.1, True),
            (13, "probabilities", "none", 0.0, False),
        ],
        quick=[(13, "indices", "mean", 0.1, True), (13, "probabilities", "none", 0.0, False)],
    ),
)
def test_on_a_part_of_the_classes(
    num_classes: int, kind: str, reduction: str, smoothing: float, is_weighted: bool
) -> None:
    """Every rank has the loss and gradients of one device, and none has all logits."""
    x = hidden_states()
    num_tokens = x.shape[0] * x.shape[1]
    labels = torch.randint(num_classes, (num_tokens,)).index_fill(0, torch.tensor([0, 7]), -100)
    target = labels if kind == "indices" else probabilities(num_tokens, num_classes)
    weight = torch.rand(num_classes, dtype=torch.float64) if is_weighted else None
    model = Head(num_classes, reduction=reduction, label_smoothing=smoothing, weight=weight)
    reference, ranks, graphs = on_ranks(model, x, target, num_ranks=3, backend="aot_eager", strategy=MegatronSP())
    assert_ranks_equal_one_device(reference, ranks)
    for gm in graphs:
        assert nodes_of(gm, torch.ops.sptransform.log_softmax.default)
        assert not any(nodes_of(gm, target) for target in (aten.log_softmax.int, aten.cross_entropy_loss.default))
