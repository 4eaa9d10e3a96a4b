"""What is known of the numbers of groups: that they are some, and that something counts them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from sptransform.op_rules import DEFAULT_RULES
from sptransform.routing.groups import are_below, counted_up_to, source
from tests.support.graphs import captured

pytestmark = pytest.mark.slow

GROUPS = 5


def results(model: Any, *args: Tensor) -> tuple[fx.Node, list[fx.Node]]:
    """The first input, and what the model returns."""
    gm, _ = captured(model, *args)
    (output,) = gm.graph.find_nodes(op="output")
    return gm.graph.find_nodes(op="placeholder")[0], list(output.args[0])


def test_numbers_below() -> None:
    def model(scores: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        chosen = scores.topk(2)[1]
        shared = torch.cat([chosen, scores.argmax(-1, keepdim=True)], -1)
        below = (chosen, shared.flatten().sort()[0], chosen[:2].int().t(), (ids * 7) % GROUPS, chosen[ids])
        wide = torch.cat([scores, scores], -1)
        joined = torch.cat([chosen[0], ids])
        others = (wide.argmax(-1), scores.argmax(), ids[1:], ids % (GROUPS + 1), chosen + 1, joined)
        return *below, *others

    _, found = results(model, torch.randn(6, GROUPS), torch.randint(3, (4,)))
    assert [are_below(node, GROUPS) for node in found] == [True] * 5 + [False] * 6


def test_counts() -> None:
    def model(chosen: Tensor) -> tuple[Tensor, ...]:
        flat = chosen.flatten()
        keys, order = flat.sort()
        numbers = torch.arange(GROUPS)

        def counted(x: Tensor, bins: int = GROUPS, low: int = 0, high: int = GROUPS - 1) -> Tensor:
            return torch.histc(x.float(), bins, low, high).int().cumsum(0)

        counts = (
            counted(keys), counted(chosen.t()), counted(chosen, high=GROUPS).to(torch.int32),
            torch.searchsorted(flat[order], numbers, side="right"),
        )  # fmt: skip
        others = (
            counted(keys[1:]), counted(keys + 1), counted(chosen.half().bfloat16() * 1), counted(chosen, GROUPS + 1),
            counted(chosen, low=-1), torch.histc(keys.float(), GROUPS, 0, GROUPS - 1),
            torch.searchsorted(keys, numbers), torch.searchsorted(keys, numbers + 1, right=True),
            torch.searchsorted(chosen.flatten().sort(descending=True)[0], numbers, right=True),
            torch.searchsorted(keys, torch.arange(GROUPS - 1), right=True),
        )  # fmt: skip
        return *counts, *others

    chosen, found = results(model, torch.randint(GROUPS, (6, 2)))
    sources = [counted_up_to(node, GROUPS, DEFAULT_RULES) for node in found]
    assert sources[:4] == [chosen] * 4
    assert chosen not in sources[4:]


def test_a_dtype_that_lacks_numbers_has_not_the_same() -> None:
    def model(chosen: Tensor) -> tuple[Tensor, ...]:
        return chosen.bfloat16(), chosen.to(torch.uint8), chosen.float()

    chosen, found = results(model, torch.randint(GROUPS, (6,)))
    assert [source(node, 257) is chosen for node in found] == [False, False, True]
    assert [source(node, 255) is chosen for node in found] == [True, True, True]
