"""Zeros that are joined to a tensor are padding; whatever else is joined stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sptransform.passes.normalize.pad_with_zeros import PadWithZeros
from tests.support.graphs import after, nodes_of

PASS = (PadWithZeros(),)
aten = torch.ops.aten
X = torch.randn(2, 3, 4)


@pytest.mark.parametrize(
    ("function", "padding"),
    [
        (lambda x: torch.cat([torch.zeros_like(x[:, :1]), x], 1), [0, 0, 1, 0]),
        (lambda x: torch.cat([x.new_zeros(2, 3, 2), x, torch.zeros(2, 3, 1), torch.zeros(2, 3, 1)], -1), [2, 2]),
    ],
)
def test_zeros_are_padding(function: Callable[[Tensor], Tensor], padding: list[int]) -> None:
    gm, _ = after(PASS, function, X)
    (node,) = nodes_of(gm, aten.constant_pad_nd.default)
    assert node.args[1] == padding and not nodes_of(gm, aten.cat.default)
    assert torch.equal(gm(X)[0], function(X))


@pytest.mark.slow
@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.cat([torch.ones_like(x[:, :1]), x], 1),
        lambda x: torch.cat([x[:, :1], x], 1),
        lambda x: torch.cat([torch.zeros_like(x), x[:, :1]], 1),
        lambda x: torch.cat([torch.zeros(2, 3, 4, dtype=torch.float64), x], 1),
        lambda x: torch.cat([torch.zeros_like(x)], 1),
    ],
    ids=["ones", "entries", "one entry", "another dtype", "nothing"],
)
def test_others_stay(function: Callable[[Tensor], Tensor]) -> None:
    gm, _ = after(PASS, function, X)
    assert nodes_of(gm, aten.cat.default) and not nodes_of(gm, aten.constant_pad_nd.default)
