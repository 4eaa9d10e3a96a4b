"""A user's passes: where they run, what is checked of them before anything runs, and that a wrong one is named."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import fx

import sptransform
from sptransform import PIPELINE, Context, Pass, UsageError, VerificationError
from sptransform.graph import notes
from sptransform.graph.edit import emit_like, succeed
from sptransform.graph.redistribute import is_redistribute
from sptransform.rules.decision import Replicate
from sptransform.sharding.placement import R
from tests.support.equality import assert_equal_to_one_device, run_one_device
from tests.support.golden import Golden
from tests.support.rewritten import Asked, on_pretended_ranks
from tests.support.tiny import AttentionWithLoss, attention_with_loss, token_inputs

aten = torch.ops.aten


class Counted(Pass):
    """Says what it saw."""

    ran: ClassVar[list[str]] = []

    def run(self, graph: fx.Graph, context: Context) -> None:
        self.ran.append(f"{context.mesh.size} ranks, {sum(map(is_redistribute, graph.nodes)) > 0}")


def counted(place: str) -> list[str]:
    """What a pass at this place sees, over a mesh of two dims."""
    kind = type("Counted", (Counted,), {"after": place, "ran": []})
    sptransform.rewrite(
        attention_with_loss(), ("ring", "megatron"), token_inputs(), world_size=(2, 4), passes=[kind()]
    )
    return kind.ran


@pytest.mark.parametrize(
    ("place", "saw"),
    [
        ("capture", ["8 ranks, False"]),
        ("normalize", ["8 ranks, False"]),
        ("InsertRedistributes", ["2 ranks, True", "4 ranks, True"]),
        ("distribute", ["2 ranks, False", "4 ranks, False"]),
        ("finish", ["8 ranks, False"]),
    ],
)
def test_a_pass_runs_at_its_place(place: str, saw: list[str]) -> None:
    assert counted(place) == saw


def named(name: str, after: str, **members: Any) -> Pass:
    return type(name, (Pass,), {"after": after, "run": lambda self, graph, context: None, **members})()


def test_passes_at_one_place_run_in_order() -> None:
    passes = [named("First", "SplitMeans"), named("Second", "First"), named("Third", "SplitMeans")]
    names = [step.name for step in PIPELINE.with_passes(passes).normalize]
    assert names[names.index("SplitMeans") :][:4] == ["SplitMeans", "Third", "First", "Second"]
    first, *_, last = PIPELINE.with_passes([named("Last", "finish"), named("Early", "capture")])
    assert (first.name, last.name) == ("Early", "Last")


def test_a_pipeline_prints_its_phases() -> None:
    text = str(PIPELINE.with_passes([named("Mine", "SplitMeans")]))
    assert [line.split(":")[0] for line in text.splitlines()] == ["normalize", "distribute", "finish"]
    assert "SplitMeans > Mine > ChunkLosses" in text


REFUSED: dict[str, Callable[[], list[Any]]] = {
    "class": lambda: [Counted],
    "no_pass": lambda: [print],
    "place": lambda: [named("Mine", "Nowhere")],
    "invariant": lambda: [named("Mine", "normalize", ensures=frozenset({"placd"}))],
    "name": lambda: [named("Localize", "normalize")],
    "phase": lambda: [named("finish", "normalize")],
    "text": lambda: [named("Mine", "normalize", requires="functional")],
    "nothing": lambda: [type("Mine", (Pass,), {})()],
    "order": lambda: [named("Mine", "Other"), named("Other", "normalize")],
    "twice": lambda: [named("Mine", "normalize"), named("Mine", "finish")],
    "requires": lambda: [named("Mine", "normalize", requires=frozenset({"typed"}))],
    "breaks": lambda: [named("Mine", "InsertRedistributes", breaks=frozenset({"typed"}))],
    "breaks_the_end": lambda: [named("Mine", "finish", breaks=frozenset({"lowered"}))],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_at_once(name: str, golden: Golden) -> None:
    with pytest.raises(UsageError) as error:
        sptransform.rewrite(attention_with_loss(), "ulysses", token_inputs(), world_size=2, passes=REFUSED[name]())
    golden.check(f"own_passes_{name}", message=str(error.value))


# --- a pass that is right ---------------------------------------------------------------------------------------


class Halved(AttentionWithLoss):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 2) / 2 + x.sin()


class DropScales(Pass):
    """``(x * a) / a`` -> ``x``, and ``sin(x)`` -> ``cos(x - pi / 2)``, of which the notes are made anew."""

    after = "capture"
    requires = ensures = frozenset({"functional"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.div.Tensor):
            product = node.args[0]
            if product.target == aten.mul.Tensor and product.args[1] == node.args[1]:
                node.replace_all_uses_with(product.args[0])
                graph.erase_node(node)
                graph.erase_node(product)
        for node in graph.find_nodes(op="call_function", target=aten.sin.default):
            turned = emit_like(node, aten.sub.Tensor, node.args[0], torch.pi / 2)
            succeed(node, emit_like(node, aten.cos.default, turned))


def test_a_users_pass_is_part_of_an_exact_run() -> None:
    torch.manual_seed(0)
    model = Halved().double()
    asked = [Asked(2, "ulysses"), Asked((2, 2), ("ring", "megatron"))]
    found = on_pretended_ranks(model, token_inputs(), asked, passes=[DropScales()])
    reference = run_one_device(model, token_inputs())
    for ranks in found.values():
        assert "aten.cos" in str(ranks.graphs[0].graph_module.code)
        for result in ranks.results():
            assert_equal_to_one_device(reference, result, 1e-12)


# --- passes that are wrong --------------------------------------------------------------------------------------


def first(graph: fx.Graph, found: Callable[[fx.Node], bool]) -> fx.Node:
    return next(node for node in graph.nodes if found(node))


def read_the_shard(graph: fx.Graph) -> None:
    node = first(graph, is_redistribute)
    for output in list(node.users):
        output.replace_all_uses_with(node.args[0][0])


def linear_of(graph: fx.Graph) -> fx.Node:
    return first(graph, lambda node: node.target == aten.linear.default)


def add_without_a_note(graph: fx.Graph) -> None:
    linear = linear_of(graph)
    with graph.inserting_after(linear):
        new = graph.call_function(aten.neg.default, (linear,))
    new.meta["val"] = linear.meta["val"]
    linear.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def add_with_the_note_of_another(graph: fx.Graph) -> None:
    linear = linear_of(graph)
    with graph.inserting_after(linear):
        new = graph.call_function(aten.neg.default, (linear,))
    new.meta = dict(linear.meta)
    linear.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def add_without_a_placement(graph: fx.Graph) -> None:
    linear = linear_of(graph)
    emit_like(linear, aten.relu.default, linear.args[0])


def add_before_another(graph: fx.Graph) -> None:
    linear = linear_of(graph)
    with graph.inserting_after(linear):
        new = graph.call_function(aten.neg.default, (linear,))
    new.meta["val"] = linear.meta["val"]
    again = emit_like(new.next, aten.neg.default, new)
    linear.replace_all_uses_with(again, delete_user_cb=lambda user: user is not new)


def call_a_function(graph: fx.Graph) -> None:
    linear = linear_of(graph)
    with graph.inserting_after(linear):
        new = graph.call_function(operator.neg, (linear,))
    new.meta["val"] = linear.meta["val"]
    linear.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def call_a_method(graph: fx.Graph) -> None:
    linear = linear_of(graph)
    with graph.inserting_after(linear):
        graph.call_method("neg", (linear,))


def transpose_unsaid(graph: fx.Graph) -> None:
    node = first(graph, lambda node: node.target == aten.permute.default)
    node.args = (node.args[0], [0, 1, 2, 3, 4])


def multiply_by_another_shape(graph: fx.Graph) -> None:
    linear = linear_of(graph)
    linear.args = (linear.args[0], linear.args[0], linear.args[2])


def drop_a_result(graph: fx.Graph) -> None:
    graph.output_node().args = ((),)


def place_without_a_decision(graph: fx.Graph) -> None:
    linear = linear_of(graph)
    new = emit_like(linear.next, aten.neg.default, linear)
    notes.set_placement(new, *notes.note(linear).placements)
    linear.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def state_another_placement(graph: fx.Graph) -> None:
    notes.set_placement(linear_of(graph), R)


def decide_otherwise(graph: fx.Graph) -> None:
    notes.note(linear_of(graph)).decision = Replicate(R)


def read_a_later_node(graph: fx.Graph) -> None:
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    nodes[0].args = (nodes[-1],)


def write_in_place(graph: fx.Graph) -> None:
    emit = linear_of(graph)
    emit_like(emit.next, aten.relu_.default, emit)


WRONG: dict[str, tuple[str, Callable[[fx.Graph], None], str]] = {
    "forgets a redistribute": ("InsertRedistributes", read_the_shard, "not placed as its consumer demands"),
    "states another placement": ("AssignPlacements", state_another_placement, "not what the decision gives"),
    "states another decision": ("AssignPlacements", decide_otherwise, "not what the decision gives"),
    "adds a node without a note": ("normalize", add_without_a_note, "nothing says whether a node is differentiable"),
    "adds a node that another was made of": ("normalize", add_before_another, "nothing says whether a node is diff"),
    "calls a function": ("normalize", call_a_function, r"a node calls no op(.|\n)*built-in function neg"),
    "calls a method": ("normalize", call_a_method, "a node calls no op"),
    "leaves an old value": ("normalize", transpose_unsaid, "a fake value is not what the op gives"),
    "does not fit": ("normalize", multiply_by_another_shape, "an op does not run on its operands"),
    "drops a result": ("normalize", drop_a_result, "another number of results"),
    "places without a decision": ("AssignPlacements", place_without_a_decision, "not what a decision gives"),
    "raises": ("SplitMeans", lambda graph: [][1], "the pass raised IndexError: list index out of range"),
    "returns a graph": ("finish", lambda graph: graph, "returns nothing, not a Graph"),
    "shares a note": ("normalize", add_with_the_note_of_another, "two nodes share one note"),
    "adds a node that is not placed": ("AssignPlacements", add_without_a_placement, "has no placement"),
    "reads a later node": ("normalize", read_a_later_node, "not well formed"),
    "writes": ("normalize", write_in_place, "writes into a tensor"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_pass_is_caught_by_name(what: str) -> None:
    place, change, message = WRONG[what]
    def run(self: Pass, graph: fx.Graph, context: Context) -> Any:
        made = change(graph)
        return made if what == "returns a graph" else None

    wrong = named("Wrong", place, run=run)
    with pytest.raises(VerificationError, match=rf"^after capture > (\w+ > )*Wrong:\n(.|\n)*{message}"):
        sptransform.rewrite(attention_with_loss(), "ulysses", token_inputs(), world_size=2, passes=[wrong])
