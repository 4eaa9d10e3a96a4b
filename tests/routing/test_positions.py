"""Which tensors hold their own indices, divided or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sptransform.op_rules import DEFAULT_RULES
from sptransform.routing.positions import Positions, positions
from tests.support.graphs import captured

pytestmark = pytest.mark.slow

FOUND = (
    (lambda: torch.arange(6), Positions(0, 1)),
    (lambda: torch.arange(0, 6, 1)[:].int(), Positions(0, 1)),
    (lambda: torch.arange(12) // 2 // 3, Positions(0, 6)),
    (lambda: torch.div(torch.arange(6), 2, rounding_mode="floor"), Positions(0, 2)),
    (lambda: torch.arange(4).repeat_interleave(3), Positions(0, 3)),
    (lambda: torch.arange(4)[:, None].expand(4, 3).reshape(-1), Positions(0, 3)),
    (lambda: (torch.arange(4) // 2)[None, :].expand(3, 4), Positions(1, 2)),
    (lambda: torch.arange(4)[:, None].expand(4, 3).mT, Positions(1, 1)),
)
NOT_FOUND = (
    lambda: torch.arange(4)[None, :].expand(3, 4).reshape(-1),
    lambda: torch.arange(1, 6),
    lambda: torch.arange(0, 12, 2),
    lambda: torch.arange(6)[1:],
    lambda: torch.arange(6).reshape(2, 3),
    lambda: torch.arange(6).float(),
    lambda: torch.div(torch.arange(6), 2, rounding_mode="trunc"),
    lambda: torch.arange(6) + 1,
)


def test_positions() -> None:
    def model(x: Tensor) -> tuple[Tensor, ...]:
        return x + 1, *(make() for make, _ in FOUND), *(make() for make in NOT_FOUND)

    gm, _ = captured(model, torch.zeros(()))
    (output,) = gm.graph.find_nodes(op="output")
    expected = (None, *(found for _, found in FOUND), *(None for _ in NOT_FOUND))
    assert tuple(positions(node, DEFAULT_RULES) for node in output.args[0]) == expected
    for make, found in FOUND:
        value = make().movedim(found.dim, -1)
        assert torch.equal(value.long(), (torch.arange(value.shape[-1]) // found.step).expand_as(value))
