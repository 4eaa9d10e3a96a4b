"""What Dynamo cannot do is refused by name."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch._dynamo.variables import TensorVariable

from sptransform import CaptureError
from tests.support.asserting import asserts
from tests.support.graphs import compiled_with


def doubled(x: torch.Tensor) -> torch.Tensor:
    return x.mul(2)


def test_a_failure_inside_of_dynamo_is_refused_at_the_users_line() -> None:
    with (
        mock.patch.object(TensorVariable, "call_method", side_effect=KeyError("lost")),
        pytest.raises(CaptureError, match=r"torch.compile failed (.|\n)*in: .*x\.mul\(2\)\n  found: KeyError: .*lost"),
    ):
        compiled_with(doubled, lambda gm, _: gm, torch.ones(2))


@torch.library.custom_op("not_captured::untold", mutates_args=())
def untold(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


library = torch.library.Library("not_captured", "FRAGMENT")
library.define("on_cpu(Tensor x) -> Tensor")
library.impl("on_cpu", torch.sin, "CPU")


def raises(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("lengths of 2 are too short here: pad to 4")


def misses(x: torch.Tensor) -> torch.Tensor:
    return {"y": x}["x"]


def adds(x: torch.Tensor) -> torch.Tensor:
    return x + torch.ones(3)


def views(x: torch.Tensor) -> torch.Tensor:
    return x.view(7, -1)


def calls(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x)


@pytest.mark.parametrize(
    ("model", "what", "code", "found"),
    [
        (raises, "the model raises", "raise RuntimeError", "lengths of 2 are too short here: pad to 4"),
        (asserts, "the model raises", 'assert x.shape[0] != 2, "too short"', "AssertionError"),
        (misses, "the model raises", 'return {"y": x}["x"]', "KeyError"),
        (adds, "a call in the model fails", "return x + torch.ones(3)", "RuntimeError"),
        (views, "a call in the model fails", "return x.view(7, -1)", "shape '[7, -1]' is invalid for input of size 2"),
        (calls, "torch.compile cannot capture", "functional.linear(x)", "TypeError"),
        (lambda x: untold(x), "a custom op does not say", "untold(x)", "no fake impl"),
        (lambda x: torch.ops.not_captured.on_cpu(x), "a custom op does not say", "on_cpu(x)", "not_captured"),
    ],
    ids=["raise", "assert", "missing key", "sizes", "view", "arguments", "op without fake", "op of a device"],
)
def test_what_fails_on_one_device_says_so(model: Any, what: str, code: str, found: str) -> None:
    with pytest.raises(CaptureError) as caught:
        compiled_with(model, lambda gm, _: gm, torch.ones(2))
    first, line, error, fix = str(caught.value).splitlines()
    assert first.startswith(what) and line.startswith("  in: ") and code in line
    assert error.startswith("  found: ") and found in error and fix.startswith("  fix: ")
