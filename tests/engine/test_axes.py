"""Which dimensions are the sequence: found from attention, through flattening, masks, shifts and two lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn import functional

from sptransform.engine.axes import Axes
from sptransform.graph import dataflow, notes
from sptransform.graph.calls import op_call
from sptransform.op_rules import DEFAULT_RULES
from sptransform.passes.normalize.unrepeat_key_heads import UnrepeatKeyHeads
from sptransform.sharding.partition import Partition
from tests.passes.blocks import HIDDEN, Attention, hidden_states
from tests.support.graphs import after, nodes_of
from tests.support.models import build

aten = torch.ops.aten
BATCH, HEADS, LENGTH, KEYS, WIDTH = 2, 4, 8, 6, 2


def inferred(model: Any, *args: Any, sequence_dims: dict[str, int] | None = None) -> tuple[fx.GraphModule, Axes]:
    gm, _ = after((UnrepeatKeyHeads(),), model, *args)
    for node in gm.graph.nodes:
        if dataflow.handles_tensors(node):
            notes.note(node).rule = DEFAULT_RULES.rule_of(op_call(node))
    return gm, Axes(gm.graph, lambda size: Partition.contiguous(size, 2), sequence_dims or {})


def sequences(axes: Axes, node: fx.Node) -> list[tuple[bool, ...]]:
    """For each dimension of a node: of each of its atoms, whether it is a sequence."""
    return [tuple(axes.is_sequence(atom) for atom in atoms) for atoms in axes.dims(node)]


def placeholder(gm: fx.GraphModule, name: str) -> fx.Node:
    return next(node for node in gm.graph.nodes if node.op == "placeholder" and node.name == name)


def some_heads(length: int = LENGTH) -> torch.Tensor:
    return torch.randn(BATCH, HEADS, length, WIDTH, dtype=torch.float64)


def test_the_sequence_of_token_ids_is_found() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(11, HIDDEN).double(), Attention())
    gm, axes = inferred(model, torch.zeros(BATCH, LENGTH, dtype=torch.int64))
    assert axes.has_sequence
    (embedding,) = nodes_of(gm, aten.embedding.default)
    weight, ids = embedding.args
    assert sequences(axes, ids) == [(False,), (True,)]
    assert sequences(axes, weight) == [(False,), (False,)]


def test_only_the_sequence_is_one() -> None:
    gm, axes = inferred(Attention(), hidden_states())
    for node in gm.graph.nodes:
        if dataflow.is_tensor(node):
            flags = [any(dim) for dim in sequences(axes, node)]
            # LENGTH == HIDDEN here: sizes do not tell
            assert sum(flags) == (0 if node.op == "placeholder" and node.name != "x" else 1), node


def test_sizes_alone_say_nothing() -> None:
    """Batch, heads, length and width all alike."""

    def model(x: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(x, x, x)

    gm, axes = inferred(model, torch.randn(4, 4, 4, 4))
    assert sequences(axes, placeholder(gm, "x")) == [(False,), (False,), (True,), (False,)]


def test_no_attention_no_sequence() -> None:
    _, axes = inferred(lambda x: x.sin(), torch.zeros(2, 8))
    assert not axes.has_sequence


def test_a_hint_names_the_sequence() -> None:
    gm, axes = inferred(lambda x: x.sin(), torch.zeros(2, 8), sequence_dims={"x": 1})
    (sin,) = nodes_of(gm, aten.sin.default)
    assert sequences(axes, sin) == [(False,), (True,)]


def test_a_flattened_batch_and_sequence_is_a_product() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        rows = x.transpose(1, 2).reshape(BATCH * LENGTH, HEADS * WIDTH).sin()
        return functional.scaled_dot_product_attention(x, x, x).sum() + rows.sum()

    gm, axes = inferred(model, some_heads())
    rows = nodes_of(gm, aten.sin.default)[0]
    assert sequences(axes, rows) == [(False, True), (False, False)]
    assert [atom.size for atom in axes.dims(rows)[0]] == [BATCH, LENGTH]


def test_a_split_that_comes_later_reaches_what_came_before() -> None:
    """Only the last op says that rows are batch and sequence."""

    def model(rows: torch.Tensor) -> torch.Tensor:
        x = rows.sin().view(BATCH, LENGTH, HEADS, WIDTH).transpose(1, 2)
        return functional.scaled_dot_product_attention(x, x, x)

    gm, axes = inferred(model, torch.randn(BATCH * LENGTH, HEADS * WIDTH))
    assert sequences(axes, placeholder(gm, "rows")) == [(False, True), (False, False)]


def test_cross_attention_has_two_sequences() -> None:
    def model(query: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(query, memory, memory)

    gm, axes = inferred(model, some_heads(LENGTH), some_heads(KEYS))
    query, memory = placeholder(gm, "query"), placeholder(gm, "memory")
    assert sequences(axes, query) == sequences(axes, memory) == [(False,), (False,), (True,), (False,)]
    (of_query,), (of_memory,) = axes.dims(query)[2], axes.dims(memory)[2]
    assert of_query is not of_memory
    assert axes.partition(of_query) == Partition.contiguous(LENGTH, 2)
    assert axes.partition(of_memory) == Partition.contiguous(KEYS, 2)


def test_a_mask_has_the_sequence_on_both_dims() -> None:
    def model(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(x, x, x, mask)

    gm, axes = inferred(model, some_heads(), torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool))
    assert sequences(axes, placeholder(gm, "mask")) == [(False,), (), (True,), (True,)]


def test_a_mask_made_of_positions_carries_the_sequence_back_to_them() -> None:
    def model(x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(LENGTH)
        mask = (positions[:, None] >= positions[None, :]) & padding[:, None, None, :]
        return functional.scaled_dot_product_attention(x, x, x, mask)

    gm, axes = inferred(model, some_heads(), torch.ones(BATCH, LENGTH, dtype=torch.bool))
    assert sequences(axes, placeholder(gm, "padding")) == [(False,), (True,)]
    (positions,) = nodes_of(gm, aten.arange.default)
    assert sequences(axes, positions) == [(True,)]
    (mask,) = nodes_of(gm, aten.__and__.Tensor) + nodes_of(gm, aten.bitwise_and.Tensor)
    assert sequences(axes, mask) == [(False,), (), (True,), (True,)]


def test_a_shift_keeps_who_owns_what() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        y = functional.scaled_dot_product_attention(x, x, x)
        return y[:, :, :-1].sin().sum() + y[:, :, 1:].cos().sum()

    gm, axes = inferred(model, some_heads())
    (sin,), (cos,) = nodes_of(gm, aten.sin.default), nodes_of(gm, aten.cos.default)
    owned = []
    for node in (sin, cos):
        assert sequences(axes, node)[2] == (True,)
        (atom,) = axes.dims(node)[2]
        owned.append(axes.partition(atom).owned)
    assert owned == [(((0, 4),), ((4, 7),)), (((0, 3),), ((3, 7),))]


def test_a_sequence_behind_a_shift_is_found_from_either_side() -> None:
    """Attention sees the shifted one; the input is as long as what it was cut from."""

    def model(x: torch.Tensor) -> torch.Tensor:
        y = x[:, :, :-1]
        return functional.scaled_dot_product_attention(y, y, y)

    gm, axes = inferred(model, some_heads())
    assert sequences(axes, placeholder(gm, "x"))[2] == (True,)


def test_labels_of_real_models_carry_the_sequence() -> None:
    for name in ("llama", "gpt2"):
        model, inputs = build(name)
        gm, axes = inferred(lambda ids, labels, model=model: model(input_ids=ids, labels=labels).loss, *inputs.values())
        for which in ("ids", "labels"):
            assert sequences(axes, placeholder(gm, which)) == [(False,), (True,)], (name, which)


def in_chunks(x: torch.Tensor) -> torch.Tensor:
    """A causal convolution, then chunks of 4, the last of them padded."""
    mixed = functional.conv1d(x, x.new_ones(HIDDEN, 1, 3), padding=2, groups=HIDDEN)[..., : x.shape[-1]]
    return functional.pad(mixed, (0, -x.shape[-1] % 4)).unflatten(-1, (-1, 4)).sum(-1).cumsum(-1)


def test_a_sequence_in_chunks_is_divided_in_whole_ones() -> None:
    """Also before what makes the chunks, and by no hint."""
    gm, axes = inferred(in_chunks, torch.randn(BATCH, HIDDEN, 14))
    (convolution,) = nodes_of(gm, aten.conv1d.default)
    assert not axes.has_sequence
    axes.add_sequences([(convolution, "i0")])
    owned = {}
    (pad,), (cumsum,) = nodes_of(gm, aten.pad.default), nodes_of(gm, aten.cumsum.default)
    for node in (placeholder(gm, "x"), convolution, pad, cumsum):
        (atom, *_) = axes.dims(node)[-1]
        assert axes.is_sequence(atom), node
        owned[node.name] = str(axes.partition(atom))
    assert list(owned.values()) == ["14[0:8|8:14]", "16/2", "4/2", "4/2"]
