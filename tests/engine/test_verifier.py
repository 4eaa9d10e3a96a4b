"""Every invariant is violated once and the verifier names the node; and no redistribute can be left out unseen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import fx
from torch.nn import functional

from sptransform.diagnostics.errors import VerificationError
from sptransform.engine.context import Context
from sptransform.engine.pass_manager import run_passes
from sptransform.engine.verifier import INVARIANTS, satisfies
from sptransform.graph import notes
from sptransform.graph.edit import replace_operand
from sptransform.graph.redistribute import insert_redistribute, is_redistribute, redistribute
from sptransform.passes import PIPELINE
from sptransform.passes.distribute.assign_placements import AssignPlacements
from sptransform.passes.distribute.fuse_redistributes import FuseRedistributes
from sptransform.passes.distribute.insert_redistributes import InsertRedistributes
from sptransform.passes.distribute.localize import Localize
from sptransform.passes.distribute.lower_redistributes import LowerRedistributes
from sptransform.rules.decision import Pending, Replicate, Sharded
from sptransform.sharding.partition import Partition
from sptransform.sharding.placement import I, P, Placement, R, Shard
from tests.passes.blocks import Attention, heads, hidden_states
from tests.support.golden import Golden
from tests.support.graphs import a_context, after, captured, nodes_of

aten = torch.ops.aten


class Loss(torch.nn.Module):
    """The small attention model, with a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x)[:, :-1].pow(2).mean()


def a_graph(last: type) -> tuple[fx.Graph, Context]:
    gm, context = after(last, Loss(), hidden_states())
    return gm.graph, context


def rejected(invariant: str, graph: fx.Graph, context: Context, node: fx.Node) -> str:
    """The message, which must name the node."""
    with pytest.raises(VerificationError) as caught:
        INVARIANTS[invariant](graph, context)
    assert f"%{node.name} = " in str(caught.value)
    return str(caught.value)


def a_linear(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.target == aten.linear.default)


@pytest.mark.parametrize("last", [type(step) for step in PIPELINE])
def test_what_the_passes_leave_is_accepted(last: type) -> None:
    a_graph(last)  # run_passes runs the verifier after every pass


def test_a_placement_that_the_decision_does_not_give(golden: Golden) -> None:
    graph, context = a_graph(AssignPlacements)
    node = a_linear(graph)
    notes.set_placement(node, I)
    golden.check("errors_wrong_placement", message=rejected("placed", graph, context, node))


def test_a_tensor_without_a_placement() -> None:
    graph, context = a_graph(AssignPlacements)
    node = a_linear(graph)
    notes.note(node).placements = None
    rejected("placed", graph, context, node)


@pytest.mark.parametrize("factor", ["k", "o"])
def test_a_decision_that_the_rule_does_not_allow(factor: str) -> None:
    """Sharding what must be whole, or what only an operand has, gives no placement that means anything."""
    graph, context = a_graph(AssignPlacements)
    (node,) = [n for n in graph.nodes if n.target == aten.linear.default and len(n.args) == 3]
    note = notes.note(node)
    note.decision = Sharded(factor, Partition.contiguous(note.rule.sizes[factor], 2))
    note.rule = replace(note.rule, replicated=frozenset({factor}))
    note.placements = note.decision.outcomes(note.rule, 1)
    rejected("placed", graph, context, node)


def test_a_sharded_factor_that_the_result_lacks_and_nothing_sums() -> None:
    graph, context = a_graph(AssignPlacements)
    node = a_linear(graph)
    note = notes.note(node)
    note.decision = Sharded("k", Partition.contiguous(note.rule.sizes["k"], 2))
    note.rule = replace(note.rule, reduce=frozenset())
    note.placements = (P,)
    rejected("placed", graph, context, node)


def test_a_pending_sum_through_an_op_that_is_not_linear() -> None:
    graph, context = a_graph(AssignPlacements)
    (node,) = [n for n in graph.nodes if n.target == aten.pow.Tensor_Scalar]
    notes.note(node).decision = Pending(frozenset({0}))
    notes.set_placement(node, P)
    rejected("placed", graph, context, node)


def test_a_shard_that_does_not_fit_its_tensor() -> None:
    graph, context = a_graph(InsertRedistributes)
    node = next(n for n in graph.nodes if is_redistribute(n) and isinstance(notes.note(n).placements[0], Shard))
    shard = notes.note(node).placements[0]
    notes.set_placement(node, replace(shard, outer=3))
    rejected("placed", graph, context, node)


def test_a_missing_redistribute(golden: Golden) -> None:
    graph, context = a_graph(InsertRedistributes)
    (attention,) = nodes_of(graph.owning_module, torch.ops.sptransform.attention.default)
    moved = attention.args[0]
    replace_operand(attention, 0, moved.args[0].args[0][0])
    golden.check("errors_missing_redistribute", message=rejected("typed", graph, context, attention))


def test_a_redistribute_that_starts_elsewhere(golden: Golden) -> None:
    graph, context = a_graph(InsertRedistributes)
    node = next(n for n in graph.nodes if is_redistribute(n))
    note = notes.note(node)
    note.transitions = ((P, note.transitions[0][1]),)
    golden.check("errors_wrong_source", message=rejected("typed", graph, context, node))


def test_a_parameter_whose_gradient_would_not_be_summed() -> None:
    """Its value is the same read as I or as R; its gradient is not."""
    graph, context = a_graph(InsertRedistributes)
    linear = a_linear(graph)
    weight = linear.args[1].args[0].args[0][0]
    assert weight.op == "placeholder" and notes.note(weight).differentiable
    replace_operand(linear, 1, weight)
    message = rejected("typed", graph, context, linear)
    assert "I, demanded R" in message
    notes.note(weight).differentiable = False
    INVARIANTS["typed"](graph, context)


def test_a_pending_sum_that_is_returned() -> None:
    graph, context = a_graph(InsertRedistributes)
    (output,) = [node for node in graph.nodes if node.op == "output"]
    total = output.args[0][0].args[0].args[0][0]
    assert notes.placement(total) == P
    replace_operand(output, 0, total)
    rejected("typed", graph, context, total)


def test_a_shard_is_returned_only_where_asked_for() -> None:
    gm, context = after(InsertRedistributes, Attention(), hidden_states(), context=a_context(outputs="local"))
    INVARIANTS["typed"](gm.graph, context)
    context = replace(context, outputs="full")
    (add,) = nodes_of(gm, aten.add.Tensor)
    rejected("typed", gm.graph, context, add)


def test_a_shard_is_returned_in_the_original_order() -> None:
    gm, context = after(InsertRedistributes, Attention(), hidden_states(), context=a_context(outputs="dtensor"))
    (add,) = nodes_of(gm, aten.add.Tensor)
    INVARIANTS["typed"](gm.graph, context)
    notes.note(add).decision = None
    for other in (Shard(1, Partition.zigzag(8, 2)), Shard(1, Partition.contiguous(4, 2), outer=2)):
        notes.set_placement(add, other)
        assert "in another order" in rejected("typed", gm.graph, context, add)


def test_a_move_along_one_dimension_that_changes_more_than_owners() -> None:
    target = Shard(1, Partition.contiguous(4, 2), outer=2)
    graph, context = a_graph(InsertRedistributes)
    linear = a_linear(graph)
    insert_redistribute(linear, [linear.args[0]], [(notes.placement(linear.args[0]), target)])
    (node,) = [n for n in graph.nodes if is_redistribute(n) and notes.note(n).placements == (target,)]
    assert f"S(1:8/2) -> {target.spec}" in rejected("typed", graph, context, node)


def test_a_transition_without_a_transpose() -> None:
    graph, context = a_graph(InsertRedistributes)
    node = next(n for n in graph.nodes if is_redistribute(n) and notes.note(n).transitions[0][0] == I)
    note = notes.note(node)
    note.transitions, note.placements = ((I, I),), (I,)
    rejected("typed", graph, context, node)


def test_a_redistribute_that_was_not_lowered() -> None:
    graph, context = a_graph(LowerRedistributes)
    node = a_linear(graph)
    insert_redistribute(node, [node.args[0]], [(notes.placement(node.args[0]), I)])
    (left,) = [n for n in graph.nodes if is_redistribute(n)]
    rejected("lowered", graph, context, left)


def test_a_redistribute_is_never_run() -> None:
    with pytest.raises(AssertionError, match="left in the graph"):
        redistribute([], ())


def test_a_local_shape_that_is_not_what_the_placement_says(golden: Golden) -> None:
    graph, context = a_graph(Localize)
    node = a_linear(graph)
    node.meta["val"] = node.meta["val"].new_empty(2, 8, 8)
    golden.check("errors_wrong_local_shape", message=rejected("local", graph, context, node))


def test_a_dtype_that_changed() -> None:
    graph, context = a_graph(Localize)
    node = a_linear(graph)
    node.meta["val"] = node.meta["val"].new_empty(node.meta["val"].shape, dtype=torch.float32)
    rejected("local", graph, context, node)


def test_an_op_that_writes() -> None:
    gm, _ = captured(lambda x: x.sin().cos(), torch.zeros(2))
    (node,) = nodes_of(gm, aten.cos.default)
    node.target = aten.cos_.default
    rejected("functional", gm.graph, a_context(), node)


def test_writes_into_inputs_are_allowed() -> None:
    gm, _ = captured(lambda x: x.add_(1.0).sin(), torch.zeros(2))
    assert nodes_of(gm, aten.copy_.default)
    INVARIANTS["functional"](gm.graph, a_context())


PLACEMENTS: tuple[Placement, ...] = (I, R, P)


def test_what_satisfies_what() -> None:
    for actual in PLACEMENTS:
        for demanded in PLACEMENTS:
            assert satisfies(actual, demanded, True) == (actual == demanded)
            free = actual == demanded or {actual, demanded} == {I, R}
            assert satisfies(actual, demanded, False) == free
    assert not satisfies(None, R, False)


def test_a_whole_tensor_is_not_taken_for_a_shard() -> None:
    graph, context = a_graph(AssignPlacements)
    note = notes.note(a_linear(graph))
    assert isinstance(note.decision, object) and note.decision != Replicate()
    rejected("typed", graph, context, a_linear(graph))  # no redistributes yet


# ---- mutations: leave out one redistribute at a time


def mutants(graph: fx.Graph) -> int:
    """Number of tensors that redistributes move."""
    return sum(len(notes.note(node).transitions) for node in graph.nodes if is_redistribute(node))


def leave_out(graph: fx.Graph, index: int) -> None:
    """Let the readers of the index-th moved tensor read it unmoved."""
    for node in graph.nodes:
        if is_redistribute(node):
            count = len(notes.note(node).transitions)
            if index < count:
                (moved,) = [user for user in node.users if user.args[1] == index]
                moved.replace_all_uses_with(node.args[0][index])
                return
            index -= count
    raise IndexError(index)


@pytest.mark.parametrize("last", [InsertRedistributes, FuseRedistributes])
@pytest.mark.parametrize("outputs", ["full", "dtensor"])
def test_no_redistribute_can_be_left_out(last: type, outputs: str) -> None:
    def graph_of() -> tuple[fx.Graph, Context]:
        gm, context = after(last, Loss(), hidden_states(), context=a_context(outputs=outputs))
        return gm.graph, context

    graph, _ = graph_of()
    count = mutants(graph)
    assert count >= 10
    for index in range(count):
        graph, context = graph_of()
        leave_out(graph, index)
        with pytest.raises(VerificationError):
            INVARIANTS["typed"](graph, context)


def test_no_redistribute_of_a_model_with_masks_can_be_left_out() -> None:
    def model(x: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = functional.linear(x, weight)
        bias = torch.where(mask, 0.0, -10.0).to(x.dtype)
        return functional.scaled_dot_product_attention(x, x, x, bias).sin().mean()

    weight = torch.eye(2, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    count = mutants(after(InsertRedistributes, model, heads(), weight, mask)[0].graph)
    for index in range(count):
        gm, context = after(InsertRedistributes, model, heads(), weight, mask)
        leave_out(gm.graph, index)
        with pytest.raises(VerificationError):
            INVARIANTS["typed"](gm.graph, context)


def test_the_verifier_runs_after_every_pass() -> None:
    """A pass that breaks a type is caught there and then, and the message says which passes ran."""
    from sptransform.engine.pass_manager import Pass

    class Careless(Pass):
        def run(self, graph: fx.Graph, context: Context) -> None:
            leave_out(graph, 0)

    gm, _ = captured(Loss(), hidden_states())
    after = [step.name for step in PIPELINE].index("InsertRedistributes") + 1
    with pytest.raises(VerificationError, match="InsertRedistributes > Careless"):
        run_passes(gm, (*tuple(PIPELINE)[:after], Careless(), *tuple(PIPELINE)[after:]), a_context())
