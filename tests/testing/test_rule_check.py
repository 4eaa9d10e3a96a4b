"""`check_rule`, which users run on rules of their own: right rules hold, and each way to be wrong is seen."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from sptransform import OpEntry, RuleError, UsageError, rule
from sptransform.testing import check_rule
from tests.support.own_ops import doubled, eval_only, mixed_back, own, rms_norm

aten = torch.ops.aten


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def local_length(call: Any, local: Any) -> Any:
    return local.run(call, length=local.result_shapes[0][1])


def unread(call: Any) -> Any:
    return dataclasses.replace(rule("s, one -> s")(call), unread=frozenset({1}))


def joined(call: Any) -> Any:
    return dataclasses.replace(rule("s h -> s h", replicated="h")(call), self_reduced=frozenset("h"))


RIGHT = {
    "rms_norm": (rms_norm, rule("... h, h -> ... h", replicated="h"), (randn(4, 6, 5), randn(5)), (".1", ".2")),
    "overload": (own.rms_norm.default, rule("b s h, h -> b s h", replicated="h"), (randn(4, 6, 5), randn(5)), "bs"),
    "mapping": (
        rms_norm,
        rule("s h, h -> s h", replicated="h"),
        {"x": randn(6, 5), "weight": randn(5)},
        "s",
    ),
    "local form": (doubled, OpEntry(rule("b s h -> b s h"), local_length), (randn(4, 6, 5), 6), "bsh"),
    "reduced": (aten.sum.dim_IntList, rule("s h -> h", reduce="s", linear=((0,),)), (randn(6, 5), [0]), "sh"),
    "complex": (
        aten.view_as_complex.default,
        rule("s h two -> s h", replicated="two"),
        (randn(6, 5, 2),),
        "sh",
    ),
    "half precision": (
        aten.linear.default,
        rule("s k, o k -> s o", reduce="k", linear=((0,), (1,))),
        (torch.randn(8, 64, dtype=torch.bfloat16), torch.randn(6, 64, dtype=torch.bfloat16)),
        "sko",
    ),
    "all leading dims": (aten.cumsum.default, rule("... h -> ... h", replicated="..."), (randn(6, 5), 0), "h"),
    "nothing to cut": (aten.cumsum.default, rule("s h -> s h", replicated="s h"), (randn(6, 5), 0), ""),
    "float32": (aten.softmax.int, rule("s h -> s h", replicated="h"), (torch.randn(6, 5), 1), "s"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_rule_holds(name: str) -> None:
    op, own_rule, inputs, factors = RIGHT[name]
    assert sorted(check_rule(op, own_rule, inputs)) == sorted(factors)


WRONG = {
    # a factor that mixes its indices is no factor
    "softmax is cut along its dim": (aten.softmax.int, rule("s h -> s h"), (randn(6, 5), 1), "h cut .* result 0"),
    "rows depend on earlier ones": (aten.cumsum.default, rule("s h -> s h"), (randn(6, 5), 0), "s cut .* result 0"),
    "an op of the user's mixes": (rms_norm, rule("... h, h -> ... h"), (randn(4, 5), randn(5)), "h cut .* result 0"),
    # sums that are none
    "a maximum is no sum": (aten.amax.default, rule("s h -> h", reduce="s"), (randn(6, 5), [0]), "s cut .* result 0"),
    "a mean is no sum": (aten.mean.dim, rule("s h -> h", reduce="s"), (randn(6, 5), [0]), "s cut .* result 0"),
    "exp is not linear": (aten.exp.default, rule("s -> s", linear=((0,),)), (randn(6),), r"linear in \[0\]: result"),
    "an affine map is not linear": (
        aten.add.Scalar,
        rule("s -> s", linear=((0,),)),
        (randn(6), 1.0),
        r"linear in \[0\]: result",
    ),
    # the wrong dim
    "a transpose that is none": (
        aten.t.default,
        rule("a b -> a b"),
        (randn(6, 6),),
        r"has \[\(6, 3\)\], .* say \(\(3, 6\),\)",
    ),
    "operands that do not broadcast so": (
        aten.add.Tensor,
        rule("a b, a -> a b"),
        (randn(6, 6), randn(6)),
        r"a cut .* fails on operands of shape \(3, 6\), \(3,\)",
    ),
    # the op fails, or gives another shape, on shards
    "a size among the arguments": (doubled, rule("b s h -> b s h"), (randn(4, 6, 5), 6), "rank 0 fails on operands"),
    "a size that decides the shape": (
        aten.expand.default,
        rule("s h -> s h"),
        (randn(1, 5), [6, 5]),
        r"h cut .* fails on operands of shape \(1, 3\)",
    ),
    # what is not read does not matter, and what is summed is a number
    "an operand is read": (aten.mul.Tensor, unread, (randn(6), randn(1)), "s cut .* result 0"),
    "whole numbers are squared": (
        aten.square.default,
        rule("s -> s", linear=((0,),)),
        (torch.randint(1, 9, (6,)),),
        r"linear in \[0\]: result",
    ),
    "any is no sum": (aten.any.dim, rule("s h -> h", reduce="s"), (randn(6, 5) > 0, 0), "is no sum"),
    "a softmax that does not communicate": (aten.softmax.int, joined, (randn(6, 5), 1), "h cut .* result 0"),
    "an argument that is none": (
        doubled,
        OpEntry(rule("b s h -> b s h"), lambda call, local: local.run(call, lenght=3)),
        (randn(4, 6, 5), 6),
        "no argument lenght; it has x, length",
    ),
    "a shape that nodes do not have": (
        doubled,
        OpEntry(rule("b s h -> b s h"), lambda call, local: local.run(call, length=local.operands[0].shape[1])),
        (randn(4, 6, 5), 6),
        "has no attribute 'shape'",
    ),
    # forward right, backward wrong
    "the gradient mixes rows": (mixed_back, rule("s h -> s h"), (randn(6, 5),), "s cut .* gradient of operand 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_seen(name: str) -> None:
    op, own_rule, inputs, message = WRONG[name]
    with pytest.raises(AssertionError, match=message):
        check_rule(op, own_rule, inputs)


@pytest.mark.parametrize(
    ("op", "own_rule", "inputs", "message"),
    [
        (rms_norm, rule("s h -> s h"), (randn(4, 5), randn(5)), "too few operands"),
        (aten.t.default, rule("a b -> a b"), (randn(6, 5),), r"dim 0 of result 0 is 5, not \('a',\)"),
        (aten.amax.default, rule("s h -> h"), (randn(6, 5), [0]), "s leaves a result"),
        (aten.sum, rule("s -> s"), (randn(6),), "several overloads.*dim_IntList"),
        (torch.sin, rule("s -> s"), (randn(6),), "not an op"),
        (aten.sin.default, "s -> s", (randn(6),), "not a rule"),
        (aten.sin.default, lambda call: "s", (randn(6),), "returns an OpRule or None, not str"),
        (aten.sin.default, rule("s -> s"), randn(6), "arguments of a call"),
    ],
)
def test_a_rule_that_does_not_fit(op: Any, own_rule: Any, inputs: Any, message: str) -> None:
    with pytest.raises((RuleError, UsageError), match=message):
        check_rule(op, own_rule, inputs)


def test_without_gradients_only_results_are_compared() -> None:
    inputs = (randn(6, 5),)
    with torch.no_grad():
        assert check_rule(eval_only, rule("s h -> s h"), inputs) == ("s", "h")
        check_rule(mixed_back, rule("s h -> s h"), inputs)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        check_rule(eval_only, rule("s h -> s h"), inputs)


def test_the_inputs_are_left_as_they_were() -> None:
    x, weight = randn(4, 5), randn(5)
    state = torch.get_rng_state()
    check_rule(rms_norm, rule("s h, h -> s h", replicated="h"), (x, weight))
    assert x.grad is None and not x.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
