"""Sizes in arguments become this rank's; with even partitions every rank has the same graph."""

from __future__ import annotations

import torch
from torch.nn import functional

from sptransform.graph import dataflow
from sptransform.graph.printer import text
from sptransform.passes.distribute.localize import Localize
from tests.passes.blocks import Attention, by_repeat_interleave, heads, hidden_states
from tests.support.golden import Golden
from tests.support.graphs import a_context, after, assert_ranks_equal_one_device, nodes_of, on_ranks


def test_golden(golden: Golden) -> None:
    gm, _ = after(Localize, Attention(by_repeat_interleave), hidden_states())
    golden.check("localize", after=text(gm.graph.nodes, is_local=True))


def shifted(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    out = functional.scaled_dot_product_attention(query, key, value).sin()
    return functional.linear(out, out.new_ones(2, 2))[:, :, :-1].sin().sum()


def test_a_slice_of_the_sequence_cuts_on_its_owner_only(golden: Golden) -> None:
    inputs = [heads() for _ in range(3)]
    texts = {}
    for rank in range(2):
        gm, _ = after(Localize, shifted, *inputs, context=a_context(2, rank))
        texts[f"rank_{rank}"] = text(gm.graph.nodes, is_local=True)
    golden.check("localize_slice", **texts)
    reference, ranks, _ = on_ranks(shifted, *inputs, num_ranks=4)
    assert_ranks_equal_one_device(reference, ranks)


def test_even_partitions_give_every_rank_the_same_graph() -> None:
    texts = set()
    for rank in range(4):
        gm, _ = after(Localize, Attention(), hidden_states(), context=a_context(4, rank))
        texts.add(text(gm.graph.nodes, is_local=True))
    assert len(texts) == 1


def test_views_become_reshapes_with_local_sizes() -> None:
    gm, _ = after(Localize, Attention(), hidden_states())
    sizes = [node.args[1] for node in nodes_of(gm, torch.ops.aten.reshape.default)]
    assert sizes and all(size[1] == 4 for size in sizes)
    assert not nodes_of(gm, torch.ops.aten.view.default)


def test_values_are_local() -> None:
    gm, _ = after(Localize, Attention(), hidden_states())
    for node in nodes_of(gm, torch.ops.aten.linear.default):
        assert dataflow.shape(node)[1] == 4


def split_apart(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """As a class token is taken off the patches: the parts of one op have forms of their own."""
    first, rest = functional.scaled_dot_product_attention(query, key, value).split([1, query.shape[2] - 1], 2)
    return (first.sin() * rest.cos()).sum()


def test_each_result_may_have_a_form_of_its_own() -> None:
    reference, ranks, _ = on_ranks(split_apart, *(heads() for _ in range(3)), num_ranks=2)
    assert_ranks_equal_one_device(reference, ranks)
