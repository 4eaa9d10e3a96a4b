"""Order, requirements and what still holds: the pass manager stops before anything runs on a wrong graph."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from torch import fx

from sptransform.diagnostics.errors import VerificationError
from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass, run_passes
from sptransform.engine.verifier import INVARIANTS
from sptransform.passes import DISTRIBUTE, FINISH, NORMALIZE, PIPELINE
from tests.passes.blocks import Attention, hidden_states
from tests.support.graphs import a_context, captured

PHASES = {"normalize": NORMALIZE, "distribute": DISTRIBUTE, "finish": FINISH}
NAMES = [step.name for step in PIPELINE]


class Noted(Pass):
    """Notes that it ran."""

    ran: list[str]

    def __init__(self, name: str, ran: list[str]) -> None:
        self._name, self.ran = name, ran

    @property
    def name(self) -> str:
        return self._name

    def run(self, graph: fx.Graph, context: Context) -> None:
        self.ran.append(self._name)


def a_graph() -> fx.GraphModule:
    return captured(lambda x: x.sin(), torch.zeros(2))[0]


def test_passes_run_in_order() -> None:
    ran: list[str] = []
    run_passes(a_graph(), [Noted("a", ran), Noted("b", ran)], a_context())
    assert ran == ["a", "b"]


def test_the_graph_is_recompiled() -> None:
    class Cosine(Pass):
        def run(self, graph: fx.Graph, context: Context) -> None:
            for node in graph.nodes:
                if node.target == torch.ops.aten.sin.default:
                    node.target = torch.ops.aten.cos.default

    gm = run_passes(a_graph(), [Cosine()], a_context())
    assert torch.equal(gm(torch.zeros(2))[0], torch.ones(2))


@pytest.mark.parametrize("index", range(1, len(tuple(PIPELINE))))
def test_a_pass_without_what_it_requires(index: int) -> None:
    """Each pass alone, straight after capture: it runs if it needs no more than a functional graph, else not at all."""
    step = tuple(PIPELINE)[index]
    if step.requires <= {"functional"}:
        return
    gm, _ = captured(Attention(), hidden_states())
    before = str(gm.graph)
    missing = ", ".join(sorted(step.requires - {"functional"}))
    with pytest.raises(VerificationError, match=f"{step.name} requires {missing}; ran: capture"):
        run_passes(gm, [step], a_context())
    assert str(gm.graph) == before


def test_what_a_pass_breaks_no_longer_holds() -> None:
    """After Localize sizes are local: nothing that reads global ones may follow."""
    gm, _ = captured(Attention(), hidden_states())
    with pytest.raises(VerificationError, match=r"requires typed; ran: capture, .*Localize"):
        run_passes(gm, (*PIPELINE, tuple(PIPELINE)[NAMES.index("LowerRedistributes")]), a_context())


def test_a_graph_that_is_not_well_formed_is_noticed() -> None:
    class Twisted(Pass):
        """Lets a node read a later one."""

        def run(self, graph: fx.Graph, context: Context) -> None:
            first, second = [node for node in graph.nodes if node.op == "call_function"]
            first.args = (second,)

    gm, _ = captured(lambda x: x.sin().cos(), torch.zeros(2))
    with pytest.raises((VerificationError, RuntimeError)):
        run_passes(gm, [Twisted()], a_context())


def test_passes_are_frozen_dataclasses_named_as_verbs() -> None:
    for step in PIPELINE:
        assert dataclasses.is_dataclass(step) and step.__dataclass_params__.frozen, step.name
        for name in step.requires | step.ensures | step.breaks:
            assert name in INVARIANTS, (step.name, name)
        folder = next(name for name, steps in PHASES.items() if step in steps)
        assert type(step).__module__ == f"sptransform.passes.{folder}.{_snake(step.name)}"
        assert isinstance(step, Pass)


def test_every_pass_says_what_it_does() -> None:
    """The first line of a pass file is one sentence, and numbered cases follow."""
    import sys

    for step in PIPELINE:
        text = sys.modules[type(step).__module__].__doc__ or ""
        first, *rest = text.splitlines()
        assert first.rstrip().endswith((".", ":")) and len(first) > 10, step.name
        assert any(line.startswith("1. ") for line in rest), step.name


def test_the_pipeline_ends_lowered_and_local() -> None:
    holds = {"functional"}
    for step in PIPELINE:
        assert step.requires <= holds
        holds = (holds - step.breaks) | step.ensures
    assert holds == {"functional", "lowered", "local"}


def test_graphs_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="sptransform.engine.pass_manager"):
        run_passes(captured(Attention(), hidden_states())[0], PIPELINE, a_context())
    logged = [record.getMessage() for record in caplog.records if record.name == "sptransform.engine.pass_manager"]
    assert any(text.startswith("after Localize:\n%x") for text in logged)


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
