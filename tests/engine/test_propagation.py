"""Placements that follow from attention's: what stays sharded, what is replicated for nothing, what communicates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch.nn import functional

from sptransform.engine.propagation import light_nodes
from sptransform.graph import notes
from sptransform.graph.redistribute import is_redistribute
from sptransform.passes.distribute.assign_placements import AssignPlacements
from sptransform.passes.distribute.fuse_redistributes import FuseRedistributes
from sptransform.sharding.placement import I, P, R, Shard, kind
from tests.passes.blocks import HIDDEN, Attention, by_repeat_interleave, heads, hidden_states
from tests.support.graphs import Run, after, assert_ranks_equal_one_device, nodes_of, on_ranks

aten = torch.ops.aten


def placed(model: Any, *args: Any) -> fx.GraphModule:
    return after(AssignPlacements, model, *args)[0]


def moves(model: Any, *args: Any) -> list[str]:
    """What the graph's redistributes do, as "S->I", those of parameters left out."""
    gm, _ = after(FuseRedistributes, model, *args)
    found = [notes.note(node).transitions[0] for node in gm.graph.nodes if is_redistribute(node)]
    return [f"{kind(a)}->{kind(b)}" for a, b in found if (a, b) != (I, R)]


def check(model: Any, *args: Any, num_ranks: int = 2) -> Run:
    reference, ranks, _ = on_ranks(model, *args, num_ranks=num_ranks)
    assert_ranks_equal_one_device(reference, ranks)
    return reference


class Through(torch.nn.Module):
    """Attention, then something."""

    def __init__(self, then: Any) -> None:
        super().__init__()
        self.attention, self.then = Attention(by_repeat_interleave), then

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.then(self.attention(x))


def test_everything_between_attentions_stays_sharded() -> None:
    gm = placed(torch.nn.Sequential(Attention(), Attention()), hidden_states())
    for node in nodes_of(gm, aten.linear.default) + nodes_of(gm, aten.add.Tensor):
        placement = notes.placement(node)
        assert isinstance(placement, Shard) and placement.dim == 1
    assert moves(Through(lambda y: y.sum()), hidden_states()) == ["I->S", "S->S", "S->S", "P->I"]


def test_a_shift_gathers_nothing() -> None:
    model = Through(lambda y: y[:, :-1].pow(2).sum())
    assert moves(model, hidden_states()) == ["I->S", "S->S", "S->S", "P->I"]
    check(model, hidden_states(), num_ranks=4)


def test_labels_shifted_by_one_gather_nothing() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = torch.nn.Embedding(11, HIDDEN)
            self.attention = Attention()
            self.double()

        def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            logits = self.attention(self.tokens(ids))[:, :-1].reshape(-1, HIDDEN)
            return functional.cross_entropy(logits, labels[:, 1:].reshape(-1))

    ids = torch.randint(HIDDEN, (2, 8))
    labels = ids.masked_fill(torch.rand(2, 8) < 0.3, -100)
    found = moves(Model(), ids, labels)
    assert "S->I" not in found and "S->R" not in found
    for num_ranks in (2, 4):
        check(Model(), ids, labels, num_ranks=num_ranks)


def test_labels_padded_and_shifted_gather_nothing() -> None:
    def model(x: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = functional.linear(x, weight)
        y = functional.scaled_dot_product_attention(y, y, y).transpose(1, 2).reshape(2, 8, HIDDEN)
        shifted = functional.pad(labels, (0, 1), value=-100)[..., 1:]
        return functional.cross_entropy(y.view(-1, HIDDEN), shifted.reshape(-1))

    args = heads(), torch.randint(HIDDEN, (2, 8)), torch.eye(2, dtype=torch.float64, requires_grad=True)
    found = moves(model, *args)
    assert "S->I" not in found and "S->R" not in found
    check(model, *args, num_ranks=4)


def test_light_nodes_are_what_no_heavy_work_precedes() -> None:
    def model(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        table = torch.arange(8).sin().exp()
        y = functional.linear(x * 2.0, weight) * table[:, None]
        return functional.scaled_dot_product_attention(y, y, y)

    gm = placed(model, heads(), torch.eye(2, dtype=torch.float64))
    light = light_nodes(gm.graph)
    names = {node.name for node in light if node.op == "call_function"}
    assert {"arange", "sin", "exp", "mul"} <= names
    assert not light & set(nodes_of(gm, aten.linear.default))


def test_a_light_node_is_cut_where_everybody_wants_the_same_cut() -> None:
    def model(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        table = torch.arange(8).double().sin()[:, None]
        y = functional.linear(x, weight) * table
        return functional.scaled_dot_product_attention(y, y, y)

    args = heads(), torch.eye(2, dtype=torch.float64)
    (sin,) = nodes_of(placed(model, *args), aten.sin.default)
    assert isinstance(notes.placement(sin), Shard)
    check(model, *args)


def test_a_light_node_is_replicated_where_the_whole_is_demanded() -> None:
    """A table read as a whole by an attention mask, and in parts by a linear's output: computing it costs nothing."""

    def model(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        table = torch.arange(8).double().sin()
        y = functional.linear(x, weight) * table[:, None]
        return functional.scaled_dot_product_attention(y, y, y, table[None, :] + table[:, None]).sin().mean()

    args = heads(), torch.eye(2, dtype=torch.float64, requires_grad=True)
    sin, _ = nodes_of(placed(model, *args), aten.sin.default)
    assert notes.placement(sin) == I
    assert "S->I" not in moves(model, *args) and "S->R" not in moves(model, *args)
    check(model, *args)


def test_a_mask_over_two_sequence_dims_is_whole_where_heads_are_sharded() -> None:
    def model(x: torch.Tensor, weight: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(8)
        mask = (positions[:, None] >= positions[None, :]) & padding[:, None, None, :]
        y = functional.linear(x, weight)
        seen = mask.cumsum(-1) > 0  # that no program says
        return functional.scaled_dot_product_attention(y, y, y, seen)

    args = heads(), torch.eye(2, dtype=torch.float64, requires_grad=True), torch.ones(2, 8, dtype=torch.bool)
    gm = placed(model, *args)
    (mask,) = nodes_of(gm, aten.__and__.Tensor) + nodes_of(gm, aten.bitwise_and.Tensor)
    assert notes.placement(mask) == I
    assert set(moves(model, *args)) == {"I->S", "S->S", "S->I"}
    check(model, *args, num_ranks=4)


def test_a_sum_over_the_sequence_is_pending_and_passes_linear_ops() -> None:
    def then(y: torch.Tensor) -> torch.Tensor:
        return y.sum(1).neg().mul(0.5).reshape(-1).sum()

    gm = placed(Through(then), hidden_states())
    for target in (aten.neg.default, aten.mul.Tensor):
        (node,) = nodes_of(gm, target)
        assert notes.placement(node) == P
    assert moves(Through(then), hidden_states())[-1] == "P->I"
    check(Through(then), hidden_states())


def test_a_pending_sum_is_summed_before_what_is_not_linear() -> None:
    def then(y: torch.Tensor) -> torch.Tensor:
        return y.sum(1).sin().sum()

    (sin,) = nodes_of(placed(Through(then), hidden_states()), aten.sin.default)
    assert notes.placement(sin) != P
    check(Through(then), hidden_states())


def test_a_pooled_vector_read_by_every_position_is_summed_once_each_way() -> None:
    def then(y: torch.Tensor) -> torch.Tensor:
        return (y * y.mean(1, keepdim=True).tanh()).pow(2).sum()

    check(Through(then), hidden_states(), num_ranks=4)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_cross_attention_of_two_lengths(num_ranks: int) -> None:
    def model(x: torch.Tensor, memory: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        query, key = functional.linear(x, weight), functional.linear(memory, weight)
        return functional.scaled_dot_product_attention(query, key, key).sin().mean()

    args = heads(8), heads(12), torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    found = moves(model, *args)
    assert found.count("S->S") == 2 and "S->R" not in found
    check(model, *args, num_ranks=num_ranks)


def test_rows_of_batch_and_sequence_stay_sharded() -> None:
    def then(y: torch.Tensor) -> torch.Tensor:
        return y.reshape(-1, HIDDEN).softmax(-1).view(2, 8, HIDDEN).pow(2).sum()

    gm = placed(Through(then), hidden_states())
    (rows,) = nodes_of(gm, aten.softmax.int)
    placement = notes.placement(rows)
    assert isinstance(placement, Shard) and (placement.dim, placement.outer) == (0, 2)
    assert "S->I" not in moves(Through(then), hidden_states())
    check(Through(then), hidden_states())


@pytest.mark.parametrize("length", [6, 7, 3])
def test_lengths_that_ranks_do_not_divide(length: int) -> None:
    def model(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = functional.linear(x, weight)
        return functional.scaled_dot_product_attention(y, y, y, is_causal=True)[:, :, 1:].sin().mean()

    check(model, heads(length), torch.randn(2, 2, dtype=torch.float64, requires_grad=True), num_ranks=4)


def test_one_token_is_a_sum_over_ranks() -> None:
    first = Through(lambda y: y[:, 0].square().sum())
    assert moves(first, hidden_states()) == ["I->S", "S->S", "S->S", "P->I"]
    check(first, hidden_states(), num_ranks=3)


def test_a_loop_over_all_tokens_gathers_once() -> None:
    every = Through(lambda y: sum((y[:, at] ** (at + 1)).sum() for at in range(y.shape[1])))
    assert moves(every, hidden_states()) == ["I->S", "S->S", "S->S", "S->I"]
    check(every, hidden_states(), num_ranks=3)


def test_sequences_that_are_joined_keep_their_owners() -> None:
    """One token before them, a part of them after them: no rank gets all rows."""

    def joined(y: torch.Tensor) -> torch.Tensor:
        longer = torch.cat([y.mean(1, keepdim=True), y, y[:, 2:]], 1)
        return longer.softmax(-1).square().sum()

    found = moves(Through(joined), hidden_states())
    assert "S->R" not in found and "S->I" not in found
    check(Through(joined), hidden_states(), num_ranks=3)
