"""A model that marks a tensor of its own as one that requires gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sptransform.diagnostics.errors import CaptureError
from tests.support.graphs import compiled_with, run_once

Function = Callable[..., torch.Tensor]


def by_attribute(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    hidden = x[:, None] * 2
    hidden.requires_grad = True
    return (hidden * weight).sin()


def by_method(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return ((x * 2).requires_grad_() * weight).sin()


def read_again(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What the model reads of the mark is what it wrote."""
    hidden = x * 2
    hidden.requires_grad_()
    product = hidden.cos()
    return (product * weight).sin() if hidden.requires_grad and product.requires_grad else product + weight


def of_an_input(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x.requires_grad = True
    return x * weight


def leaf_of_a_computed_tensor(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """That it requires none is something else: it would lose the weight's gradient."""
    hidden = (x * weight).detach()
    hidden.requires_grad = False
    return hidden * weight


@pytest.mark.parametrize("program", [by_attribute, by_method, read_again])
def test_values_and_gradients(program: Function) -> None:
    inputs = [torch.randn(4), torch.randn(4, requires_grad=True)]
    reference = run_once(program, inputs)
    found = run_once(lambda *args: compiled_with(program, lambda gm, _: gm, *args), inputs)
    torch.testing.assert_close(found.outputs[0], reference.outputs[0])
    torch.testing.assert_close(found.grads[1], reference.grads[1])


@pytest.mark.parametrize("program", [of_an_input, leaf_of_a_computed_tensor])
def test_other_marks_are_refused(program: Function) -> None:
    with pytest.raises(CaptureError, match="requires_grad"):
        compiled_with(program, lambda gm, _: gm, torch.randn(4), torch.randn(4, requires_grad=True))
