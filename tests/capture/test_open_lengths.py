"""Where a pipeline that is run for any length has to know the number, it is run again for one; no fault means that."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import fx
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional

from sptransform.compiler import rewrite
from sptransform.compiler.options import Options
from sptransform.engine.context import Context
from sptransform.graph import dataflow
from sptransform.sharding.mesh import Mesh
from sptransform.sharding.sizes import SymbolicSizeError, needs_number, number
from tests.passes.blocks import heads
from tests.support.graphs import while_captured

k = sympy.Symbol("k", integer=True, positive=True)


def raised(call: Callable[[], Any]) -> BaseException:
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


@pytest.mark.parametrize(
    "call",
    [
        lambda: 2 * k < 7,
        lambda: max(3 * k, 5),
        lambda: sorted([k, sympy.Integer(3)]),
        lambda: int(4 * k),
        lambda: float(k + 1),
        lambda: number(2 * k),
        lambda: {ShapeEnv().create_unbacked_symint()},
    ],
    ids=["comparison", "max", "sorted", "int", "float", "number", "set"],
)
def test_what_only_a_number_can_answer(call: Callable[[], Any]) -> None:
    answer = lambda: bool(call())  # noqa: E731
    assert needs_number(raised(answer))


@pytest.mark.parametrize(
    "call",
    [
        lambda: None + 1,
        lambda: len(5),
        lambda: torch.empty(2).view("x"),
        lambda: 2 * k < None,
        lambda: number(),
    ],
    ids=["operator", "argument", "torch", "comparison with nothing", "missing argument"],
)
def test_other_type_errors_are_faults(call: Callable[[], Any]) -> None:
    error = raised(call)
    assert isinstance(error, TypeError) and not needs_number(error)


def attend(x: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(x, x, x)


def rewritten_for_any_length(monkeypatch: pytest.MonkeyPatch, fail: Callable[[Any], Any]) -> int:
    """How often the pipeline ran, where ``fail`` is called with the sequence's length before anything else."""
    runs = 0

    def distribute(gm: fx.GraphModule, context: Context, *others: Any) -> None:
        nonlocal runs
        runs += 1
        (x,) = (node for node in gm.graph.find_nodes(op="placeholder") if dataflow.is_tensor(node))
        fail(dataflow.shape(x)[2])

    monkeypatch.setattr(rewrite, "distribute", distribute)
    x = heads()
    torch._dynamo.mark_dynamic(x, 2)
    options = Options.of({"strategy": "ulysses"})
    mesh = Mesh.pretended(2)
    while_captured(attend, lambda gm, inputs: rewrite.rewrite_graph(gm, inputs, options, mesh), x)
    return runs


def test_a_comparison_of_an_open_length_is_made_for_the_length_at_hand(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="sptransform"):
        assert rewritten_for_any_length(monkeypatch, lambda length: length < 7) == 1
        assert rewritten_for_any_length(monkeypatch, lambda length: bool(length < 7)) == 2
    assert "compiling for one length" in caplog.text


@pytest.mark.parametrize("error", [TypeError("a fault"), ValueError("a fault")])
def test_a_fault_is_raised_and_nothing_is_run_again(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    seen = []

    def fail(length: Any) -> None:
        seen.append(length)
        raise error

    with pytest.raises(BackendCompilerFailed, match="a fault"):
        rewritten_for_any_length(monkeypatch, fail)
    assert len(seen) == 1 and not isinstance(seen[0], int)


def test_what_rules_raise_of_sizes_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(length: Any) -> None:
        if not isinstance(length, int):
            raise SymbolicSizeError("uneven")

    assert rewritten_for_any_length(monkeypatch, fail) == 2
