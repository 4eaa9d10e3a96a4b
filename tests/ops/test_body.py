"""Bodies of custom autograd.Functions: as text and back, and run."""

from __future__ import annotations

from math import inf

import pytest
import torch

from sptransform.ops.body import Body, Step, Value, is_constant, parse

aten = torch.ops.aten

TEXT = (
    "operands(%0, %1); %2 = aten.topk.default(%0, 2); %3 = %2[0]; %4 = aten.mul.Tensor(%3, %1); results(%4); "
    "given(%5); %6 = aten.mul.Tensor(%5, %3); gradients(None, %6)"
)


def test_a_body_is_written_as_it_is_read() -> None:
    assert str(parse(TEXT)) == TEXT


def test_the_backward_saves_what_it_reads_of_the_forward() -> None:
    assert parse(TEXT).saved == (Value(3),)
    assert parse("operands(%0); results(%0); given(%1); gradients(%0)").saved == (Value(0),)


@pytest.mark.parametrize(
    "x", [-1, 2.5, -inf, True, None, "none", torch.int64, torch.device("cuda:1"), torch.strided, torch.preserve_format,
          [1, -2], [Value(0), None], []],
    ids=str,
)  # fmt: skip
def test_every_constant_comes_back(x: object) -> None:
    assert is_constant(x)
    step = Step(Value(1), aten.sum.default, (Value(0), x), (("name", x),))
    body = Body((Value(0),), (step,), (Value(1),), (Value(2),), (), (None,))
    assert parse(str(body)) == body


def test_other_arguments_are_no_constants() -> None:
    assert not is_constant([torch.ones(1)])
    assert not is_constant(slice(1))


@pytest.mark.parametrize("text", ["", "x = 1", "operands(%0); results(%0)", "operands(%0) results(%0)"])
def test_another_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no body"):
        parse(text)


def test_the_op_has_the_gradient_that_its_body_says() -> None:
    text = (
        "operands(%0, %1); %2 = aten.mul.Tensor(%0, %1); %3 = aten.sign.default(%0); results(%2, %3); given(%4, %5); "
        "%6 = aten.mul.Scalar(%4, 7.0); gradients(%6, None)"
    )
    x, w = torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor([3.0, 4.0], requires_grad=True)
    product, sign = torch.ops.sptransform.autograd_function("F", [x, w], [], text, [1])
    assert product.tolist() == [3.0, -8.0] and sign.tolist() == [1.0, -1.0]
    assert not sign.requires_grad
    product.sum().backward()
    assert x.grad.tolist() == [7.0, 7.0] and w.grad is None


def test_a_body_has_the_casts_that_it_was_captured_with() -> None:
    text = "operands(%0); %1 = aten.mm.default(%0, %0); results(%1); given(%2); gradients(None)"
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.ops.sptransform.autograd_function("F", [torch.ones(2, 2)], [], text, [])
    assert found.dtype == torch.float32
