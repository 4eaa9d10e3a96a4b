"""Gradients of the operands of mask programs are those that autograd has of the program's ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sptransform.ops.mask_gradients import PULLBACKS, gradients, without_gradient
from sptransform.ops.mask_program import LOOKUP, parse

HEADS, QUERIES, KEYS = 3, 4, 5


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


ROW, COLUMN, OF_HEADS, TABLE = numbers(QUERIES, 1), numbers(KEYS), numbers(HEADS, 1, 1), numbers(HEADS, 6)
HIDDEN = numbers(QUERIES, KEYS) > 0.3
INDEX = torch.randint(-6, 6, (2, 1, QUERIES, KEYS), generator=torch.Generator().manual_seed(0))

# the program and its operands; those of floating point have gradients. Operands broadcast, each in its own way
PROGRAMS: dict[str, tuple[str, list[Tensor]]] = {
    "%0": ("%0", [numbers(2, 1, QUERIES, KEYS)]),
    "abs": ("%2 = add.Tensor(%0, %1); %3 = abs(%2)", [ROW, COLUMN]),
    "add.Scalar": ("%1 = add.Scalar(%0, 0.5)", [ROW]),
    "add.Tensor": ("%3 = add.Tensor(%0, %1, alpha=-0.3); %4 = add.Tensor(%3, %2)", [ROW, COLUMN, OF_HEADS]),
    "add.Tensor of a number": ("%1 = add.Tensor(%0, 2)", [numbers()]),
    "clamp": ("%2 = add.Tensor(%0, %1); %3 = clamp(%2, -0.5); %4 = clamp(%3, None, 0.7)", [ROW, COLUMN]),
    "clamp_max": ("%2 = add.Tensor(%0, %1); %3 = clamp_max(%2, 0.2)", [ROW, COLUMN]),
    "clamp_min": ("%2 = add.Tensor(%0, %1); %3 = clamp_min(%2, 0.2)", [ROW, COLUMN]),
    "div.Scalar": ("%1 = div.Scalar(%0, 0.7)", [ROW]),
    "div.Tensor": ("%2 = div.Tensor(%0, %1); %3 = div.Tensor(%2, 3)", [ROW, COLUMN]),
    "exp": ("%2 = mul.Tensor(%0, %1); %3 = exp(%2)", [ROW, COLUMN]),
    "log": ("%1 = log(%0)", [ROW.abs()]),
    "lookup": ("%2 = lookup(%1, %0)", [INDEX, TABLE]),
    "lookup in one row": ("%3 = lookup(%1, %0); %4 = mul.Tensor(%3, %2)", [INDEX, numbers(1, 6), OF_HEADS]),
    "lookup in one row by heads": ("%2 = lookup(%1, %0)", [INDEX.expand(2, HEADS, QUERIES, KEYS), numbers(1, 6)]),
    "lookup in two dimensions": ("%3 = lookup(%1, %0); %4 = add.Tensor(%3, %2)", [INDEX[0, 0], TABLE, OF_HEADS]),
    "lookup by keys": ("%3 = lookup(%1, %0); %4 = mul.Tensor(%3, %2)", [INDEX[0, 0, 0].int(), TABLE, ROW]),
    "lookup, twice the same": (
        "%3 = lookup(%2, %0); %4 = lookup(%2, %1); %5 = mul.Tensor(%3, %4)",
        [INDEX, INDEX.flip(-1), TABLE],
    ),
    "masked_fill.Scalar": ("%3 = sub.Tensor(%0, %1); %4 = masked_fill.Scalar(%3, %2, 0.5)", [ROW, COLUMN, HIDDEN]),
    "masked_fill.Tensor": ("%3 = masked_fill.Tensor(%0, %2, %1)", [ROW, numbers(), HIDDEN]),
    "mul.Scalar": ("%1 = mul.Scalar(%0, 3)", [COLUMN]),
    "mul.Tensor": ("%3 = mul.Tensor(%0, %1); %4 = mul.Tensor(%3, %2); %5 = mul.Tensor(%4, 2)", [ROW, COLUMN, OF_HEADS]),
    "mul.Tensor by whole numbers": ("%2 = mul.Tensor(%1, %0)", [torch.arange(QUERIES)[:, None], OF_HEADS]),
    "multiply.Tensor": ("%2 = multiply.Tensor(%0, %1)", [ROW, OF_HEADS]),
    "neg": ("%1 = neg(%0)", [ROW]),
    "negative": ("%1 = negative(%0)", [ROW]),
    "pow.Tensor_Scalar": ("%2 = sub.Tensor(%0, %1); %3 = pow.Tensor_Scalar(%2, 3)", [ROW, COLUMN]),
    "relu": ("%2 = sub.Tensor(%0, %1); %3 = relu(%2)", [ROW, COLUMN]),
    "rsub.Scalar": ("%1 = rsub.Scalar(%0, 3, 0.5)", [ROW]),
    "rsub.Tensor": ("%2 = rsub.Tensor(%0, %1, alpha=2)", [ROW, COLUMN]),
    "sigmoid": ("%1 = sigmoid(%0)", [ROW]),
    "sqrt": ("%1 = sqrt(%0)", [ROW.abs()]),
    "square": ("%2 = sub.Tensor(%0, %1); %3 = square(%2)", [ROW, COLUMN]),
    "sub.Scalar": ("%1 = sub.Scalar(%0, 3)", [ROW]),
    "sub.Tensor": ("%2 = sub.Tensor(%0, %1, alpha=2)", [ROW, COLUMN]),
    "subtract.Tensor": ("%2 = subtract.Tensor(%0, %1)", [ROW, COLUMN]),
    "tanh": ("%2 = sub.Tensor(%0, %1); %3 = tanh(%2)", [ROW, COLUMN]),
    "to.dtype": ("%2 = to.dtype(%0, float32); %3 = add.Tensor(%2, %1)", [ROW, COLUMN]),
    "where.ScalarOther": ("%2 = where.ScalarOther(%1, %0, -inf)", [ROW, HIDDEN]),
    "where.ScalarSelf": ("%2 = where.ScalarSelf(%1, 1.0, %0)", [ROW, HIDDEN]),
    "where.self": ("%3 = where.self(%2, %0, %1)", [ROW, COLUMN, HIDDEN]),
    "an operand that does not matter": ("%2 = mul.Tensor(%0, 2)", [ROW, COLUMN]),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_gradients(name: str) -> None:
    text, operands = PROGRAMS[name]
    program = parse(text)
    # the shape of the mask may be larger than the program's result: a band is joined to it
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in operands]
    result = program.run(leaves)
    shape = torch.broadcast_shapes(result.shape, (QUERIES, KEYS))
    grad = numbers(*shape)
    trained = [i for i, x in enumerate(leaves) if x.requires_grad]
    expected = torch.autograd.grad(
        result.double().expand(shape), [leaves[i] for i in trained], grad, allow_unused=True, materialize_grads=True
    )
    for i, x, y in zip(trained, gradients(program, operands, trained, grad), expected, strict=True):
        assert x.shape == operands[i].shape
        # autograd rounds to the dtype of each step, where these stay in that of sums
        exact = {"rtol": 1e-6, "atol": 1e-6} if "float32" in text else {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(x, y, **exact)
    for i in trained:  # each alone
        (alone,) = gradients(program, operands, [i], grad)
        torch.testing.assert_close(alone, gradients(program, operands, trained, grad)[trained.index(i)])


def test_every_op_has_a_program() -> None:
    """All arguments of it that have a gradient, and only ops that programs may have."""
    found: dict[Any, set[int]] = {}
    for text, operands in PROGRAMS.values():
        program = parse(text)
        for step in program.steps:
            is_number = [hasattr(x, "index") for x in step.args]
            found.setdefault(step.target, set()).update(i for i, x in enumerate(is_number) if x)
            assert len(operands) == program.num_operands
    for target, pullbacks in PULLBACKS.items():
        assert set(pullbacks) <= found[target], target
    assert LOOKUP in PULLBACKS


@pytest.mark.parametrize(
    ("text", "trained", "blocking"),
    [
        ("%2 = erf(%0); %3 = add.Tensor(%2, %1)", [0], "aten.erf.default"),
        ("%2 = erf(%0); %3 = add.Tensor(%2, %1)", [1], None),
        ("%2 = lookup(%1, %0); %3 = floor(%2)", [1], "aten.floor.default"),
        ("%2 = lookup(%1, %0)", [0], "sptransform.lookup.default"),
        ("%2 = gt.Scalar(%0, 0); %3 = where.self(%2, %0, %1)", [0], "aten.gt.Scalar"),
        ("%2 = add.Tensor(%0, other=%1)", [1], "aten.add.Tensor"),
        ("%1 = mul.Tensor(%0, %0)", [], None),
    ],
)
def test_ops_without_a_gradient_are_named(text: str, trained: list[int], blocking: str | None) -> None:
    program = parse(text)
    found = without_gradient(program, trained)
    assert (None if found is None else str(found)) == blocking
    if blocking is not None:
        with pytest.raises(NotImplementedError, match=blocking):
            gradients(program, [], trained, ROW)


@pytest.mark.parametrize("index", [INDEX, INDEX[0], INDEX[0, 0], INDEX[0, 0, 0]], ids=["4", "3", "2", "1"])
def test_lookup(index: Tensor) -> None:
    found = torch.ops.sptransform.lookup(TABLE, index)
    wide = index.expand(2, HEADS, QUERIES, KEYS)
    expected = TABLE[torch.arange(HEADS)[:, None, None], wide]
    assert torch.equal(found.expand_as(expected), expected)
