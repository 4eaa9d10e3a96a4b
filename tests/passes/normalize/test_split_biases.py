"""Biases taken out of products: the same value and gradients, and a product that may be a pending sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sptransform import MegatronSP
from sptransform.capture.capture import capture
from sptransform.engine.pass_manager import run_passes
from sptransform.graph.printer import text
from sptransform.passes.normalize.split_biases import SplitBiases
from tests.support.golden import Golden
from tests.support.graphs import a_context, after, captured, nodes_of, run_once, while_captured

aten = torch.ops.aten
PASS = (SplitBiases(),)


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


LINEAR = ((2, 4, 3), (5, 3), (5,))


def megatron() -> Any:
    return a_context(strategy=MegatronSP())


def test_golden(golden: Golden) -> None:
    before, _ = captured(functional.linear, *tensors(*LINEAR))
    done, _ = after(PASS, functional.linear, *tensors(*LINEAR), context=megatron())
    golden.check("split_biases", before=text(before.graph.nodes), after=text(done.graph.nodes))


def assert_same_meaning(
    model: Callable[..., Tensor], *inputs: Tensor, changed: bool = True, tolerance: float = 1e-14
) -> None:
    def both(gm: torch.fx.GraphModule, real: list[Tensor]) -> None:
        plain, split = capture(gm, real), run_passes(capture(gm, real), PASS, megatron())
        assert (text(plain.graph.nodes) != text(split.graph.nodes)) == changed
        reference, found = run_once(gm, real), run_once(split, real)
        for x, y in zip(reference.outputs + reference.grads, found.outputs + found.grads, strict=True):
            torch.testing.assert_close(y, x, rtol=tolerance, atol=tolerance)

    while_captured(model, both, *inputs)


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        (functional.linear, LINEAR),
        (functional.linear, ((3,), (5, 3), (5,))),
        (torch.addmm, ((5,), (4, 3), (3, 5))),
        (torch.addmm, ((4, 1), (4, 3), (3, 5))),
        (torch.addmm, ((1,), (4, 3), (3, 5))),
        (torch.baddbmm, ((2, 4, 5), (2, 4, 3), (2, 3, 5))),
        (torch.baddbmm, ((5,), (2, 4, 3), (2, 3, 5))),
    ],
    ids=lambda x: x.__name__ if callable(x) else str(x),
)
def test_products(model: Callable[..., Tensor], shapes: tuple[tuple[int, ...], ...]) -> None:
    assert_same_meaning(model, *tensors(*shapes))


@pytest.mark.parametrize(
    "model",
    [
        lambda bias, a, b: torch.addmm(bias, a, b, beta=0.5),
        lambda bias, a, b: torch.addmm(bias, a, b, alpha=2.0),
        lambda bias, a, b: torch.baddbmm(bias, a[None], b[None], beta=0.5),
        lambda bias, a, b: functional.linear(a, b.T),
    ],
    ids=["beta", "alpha", "beta of a batch", "no bias"],
)
def test_what_stays(model: Callable[..., Tensor]) -> None:
    bias, a, b = tensors((5,), (4, 3), (3, 5))
    assert_same_meaning(lambda a, b, bias: model(bias, a, b) + bias, a, b, bias, changed=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("model", "shapes"), [(functional.linear, LINEAR), (torch.addmm, ((5,), (4, 3), (3, 5)))], ids=["linear", "addmm"]
)
def test_autocast(model: Callable[..., Tensor], shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> None:
    """The sum has the dtype of the product, and gradients those of the parameters; to a rounding of 16 bits."""

    def lowered(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(*inputs)

    assert_same_meaning(lowered, *tensors(*shapes, dtype=dtype), tolerance=2e-2)


def test_only_where_weights_are_cut() -> None:
    gm, _ = after(PASS, functional.linear, *tensors(*LINEAR))
    (node,) = nodes_of(gm, aten.linear.default)
    assert len(node.args) == 3
