"""Ops without a rule are opened to those they consist of, if torch defines them by others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sptransform.passes.normalize.open_composites import OpenComposites
from tests.passes.blocks import hidden_states
from tests.support.graphs import after, nodes_of, run_once

aten = torch.ops.aten

PROGRAMS = {
    "an alias": lambda x: torch.multiply(x, x),
    "a permutation": lambda x: torch.movedim(x, 1, 2),
    "several results": lambda x: sum(part.sum() for part in torch.tensor_split(x, 3, 1)),
    "an argument that is a list": lambda x: torch.hstack([x, x]),
    "itself": lambda x: torch.broadcast_to(x, x.shape),
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=list(PROGRAMS))
def test_what_is_opened_has_rules_and_computes_the_same(program: Callable[[Tensor], Tensor]) -> None:
    x = hidden_states()
    gm, context = after((OpenComposites(),), program, x)
    for node in gm.graph.nodes:
        assert node.op != "call_function" or not hasattr(node.target, "_schema") or node.target in context.rules
    run, expected = run_once(gm, [x]), run_once(program, [x])
    torch.testing.assert_close(run.outputs, expected.outputs, rtol=0, atol=0)
    torch.testing.assert_close(run.grads, expected.grads, rtol=0, atol=0)


def test_an_op_with_a_rule_stays() -> None:
    gm, _ = after((OpenComposites(),), lambda x: torch.nn.functional.linear(x, x[0]), hidden_states())
    assert len(nodes_of(gm, aten.linear.default)) == 1


def test_under_autocast_it_stays_one_op() -> None:
    def program(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.multiply(x, x)

    gm, _ = after((OpenComposites(),), program, hidden_states())
    assert len(nodes_of(gm, aten.multiply.Tensor)) == 1
