"""Where placements disagree a redistribute stands: once for the same need, and no other edge is touched."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import fx
from torch.nn import functional

from sptransform.graph import dataflow, notes
from sptransform.graph.printer import text
from sptransform.graph.redistribute import is_redistribute
from sptransform.passes.distribute.insert_redistributes import InsertRedistributes, _Inserter
from sptransform.sharding.partition import Partition
from sptransform.sharding.placement import I, P, Placement, R, Shard, cut_alike, kind, repartitions
from sptransform.sharding.sizes import Size
from sptransform.strategies.ulysses import Ulysses
from tests.passes.blocks import LENGTH, Attention, heads, hidden_states
from tests.support.golden import Golden
from tests.support.graphs import a_context, after, assert_ranks_equal_one_device, nodes_of, on_ranks


def redistributes(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if is_redistribute(node)]


def kinds(gm: fx.GraphModule) -> list[tuple[str, str]]:
    return [(kind(a), kind(b)) for node in redistributes(gm) for a, b in notes.note(node).transitions]


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(query.sin(), key, value)


def on_moved(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention between ops that keep the sequence sharded."""
    scale = query.new_ones(query.shape[-1], query.shape[-1])
    query, key, value = (functional.linear(x, scale) for x in (query, key, value))
    return functional.linear(functional.scaled_dot_product_attention(query, key, value), scale).mean()


def test_golden(golden: Golden) -> None:
    gm, _ = after(InsertRedistributes, on_moved, *(heads() for _ in range(3)))
    golden.check("insert_redistributes", after=text(gm.graph.nodes))


def test_the_same_need_is_met_once() -> None:
    """One tensor that is query, key and value moves once; another reader of it reads the sharded one."""

    def model(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = functional.linear(x, weight)
        return (functional.scaled_dot_product_attention(x, x, x).sin() + x).mean()

    gm, _ = after(InsertRedistributes, model, heads(), torch.eye(2, dtype=torch.float64))
    (attention,) = nodes_of(gm, torch.ops.aten.scaled_dot_product_attention.default)
    assert len(set(attention.args[:3])) == 1
    (linear,) = nodes_of(gm, torch.ops.aten.linear.default)
    assert isinstance(notes.placement(linear), Shard)
    assert len([user for user in linear.users if is_redistribute(user)]) == 1
    assert kinds(gm).count(("S", "S")) == 2


def test_a_parameter_read_twice_becomes_replicated_once() -> None:
    def model(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = functional.linear(functional.linear(x, weight), weight)
        return functional.scaled_dot_product_attention(x, x, x).mean()

    weight = torch.eye(2, dtype=torch.float64, requires_grad=True)
    gm, _ = after(InsertRedistributes, model, heads(), weight)
    moved = [node for node in redistributes(gm) if notes.note(node).transitions == ((I, R),)]
    assert [node.args[0][0].op for node in moved] == ["placeholder"]


def test_nothing_that_needs_no_gradient_is_made_replicated() -> None:
    """Without a gradient I and R are the same."""
    gm, _ = after(InsertRedistributes, on_moved, *(heads().detach() for _ in range(3)))
    assert ("I", "R") not in kinds(gm)


def test_outputs_are_kept_or_gathered() -> None:
    model, inputs = attend, [heads() for _ in range(3)]

    def sharded(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return on_moved(query, key, value) * 0.0 + functional.linear(query, query.new_ones(3, 2))

    for outputs, expected in (("full", I), ("dtensor", Shard), ("local", Shard)):
        _, context = after(InsertRedistributes, sharded, *inputs, context=a_context(outputs=outputs))
        (placement,) = context.result.output_placements
        assert placement == I if expected is I else isinstance(placement, Shard)
    reference, ranks, _ = on_ranks(model, *inputs, num_ranks=2)
    assert_ranks_equal_one_device(reference, ranks)


def test_a_flattened_output_is_moved_to_the_chunks_that_dtensor_knows() -> None:
    def model(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = functional.linear(query, query.new_ones(3, 2))
        loss = on_moved(query, key, value)
        return loss, rows.permute(0, 2, 1, 3).reshape(16, 12)

    _, context = after(InsertRedistributes, model, *(heads() for _ in range(3)), context=a_context(outputs="dtensor"))
    assert context.result.output_placements == (I, Shard(0, Partition.contiguous(16, 2)))


@dataclass(frozen=True)
class Folded(Ulysses):
    """Ulysses over sequences that the ranks share as a zigzag."""

    def partition(self, size: Size, num_ranks: int, is_causal: bool) -> Partition:
        return Partition.zigzag(size, num_ranks)


def at_the_output(gm: fx.GraphModule) -> list[tuple[Placement, Placement]]:
    """How what the graph returns is moved last, of each tensor that is."""
    (output,) = [node for node in gm.graph.nodes if node.op == "output"]
    picked = [dataflow.projection(node) for node in dataflow.operands(output)]
    return [notes.note(p[0]).transitions[p[1]] for p in picked if p is not None and is_redistribute(p[0])]


@pytest.mark.parametrize("outputs", ["dtensor", "local"])
def test_a_zigzag_is_returned_in_the_original_order_by_one_exchange(outputs: str) -> None:
    attention = Attention()

    def model(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = attention(x)
        return x.pow(2).mean(), x

    folded, chunks = (Shard(1, form(LENGTH, 2)) for form in (Partition.zigzag, Partition.contiguous))
    context = a_context(strategy=Folded(), outputs=outputs)
    gm, _ = after(InsertRedistributes, model, hidden_states(), context=context)
    assert at_the_output(gm) == [(P, I), (folded, chunks)]
    assert context.result.output_placements == (I, chunks)
    gm, context = after(InsertRedistributes, model, hidden_states(), context=a_context(strategy=Folded()))
    assert at_the_output(gm) == [(P, I), (folded, I)]


def test_a_clipped_output_is_returned_in_chunks_by_one_exchange() -> None:
    """``[0:3|3:7]``: no rank has to have it whole for DTensor to express it."""
    attention = Attention()
    context = a_context(outputs="dtensor")
    gm, _ = after(InsertRedistributes, lambda x: attention(x)[:, 1:], hidden_states(), context=context)
    chunks = Shard(1, Partition.contiguous(LENGTH - 1, 2))
    assert at_the_output(gm) == [(Shard(1, Partition.contiguous(LENGTH, 2).slice(1, LENGTH)), chunks)]
    assert context.result.output_placements == (chunks,)


def test_two_clips_of_a_sequence_meet_by_one_exchange() -> None:
    attention = Attention()

    def model(x: torch.Tensor) -> torch.Tensor:
        x = attention(x)
        return (x[:, 1:] * x[:, :-1]).sum()

    gm, _ = after(InsertRedistributes, model, hidden_states())
    moved = [t for node in redistributes(gm) for t in notes.note(node).transitions if cut_alike(*t)]
    assert [repartitions(*t) for t in moved] == [True]
    assert ("S", "I") not in kinds(gm)
    for num_ranks in (2, 3):
        reference, ranks, _ = on_ranks(model, hidden_states(), num_ranks=num_ranks)
        assert_ranks_equal_one_device(reference, ranks)


def test_other_axes_of_one_dimension_meet_by_way_of_the_whole() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 8)
    source, target = Shard(1, Partition.contiguous(8, 2)), Shard(1, Partition.contiguous(4, 2), outer=2)
    notes.set_placement(x, source)
    output = graph.output(x)
    moved = _Inserter(output).moved(x, target, output)
    found = [notes.note(node).transitions for node in graph.nodes if is_redistribute(node)]
    assert found == [((source, I),), ((I, target),)]
    assert notes.placement(moved) == target
