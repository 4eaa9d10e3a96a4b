"""Parameter gradients travel in buckets: of one dtype, of limited size, in the order of first use."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx, nn
from torch.nn import functional

from sptransform import annotations
from sptransform.passes import PIPELINE
from sptransform.passes.bucket_gradients import BucketGradients
from sptransform.passes.pack_moves import PackMoves
from sptransform.placement import I, R
from sptransform.printer import text
from sptransform.rewriter import is_redistribute
from tests.golden import Golden
from tests.graphs import a_context, after, assert_ranks_equal_one_device, on_ranks
from tests.passes.blocks import Attention, by_repeat_interleave, hidden_states

BEFORE = PIPELINE[: [type(step) for step in PIPELINE].index(PackMoves) + 1]


def buckets(gm: fx.GraphModule) -> list[list[str]]:
    return [
        [producer.name for producer in annotations.operands(node)]
        for node in gm.graph.nodes
        if is_redistribute(node) and set(annotations.note(node).transitions) == {(I, R)}
    ]


def test_golden(golden: Golden) -> None:
    model, x = Attention(by_repeat_interleave), hidden_states()
    gm, _ = after((*BEFORE, BucketGradients()), model, x)
    golden.check("bucket_gradients", after=text(gm.graph.nodes))


def test_one_bucket() -> None:
    gm, _ = after((*BEFORE, BucketGradients()), Attention(), hidden_states())
    assert buckets(gm) == [["query_weight", "key_weight", "value_weight", "out_weight", "out_bias"]]


def test_a_limit_splits() -> None:
    """query 512 bytes, key and value 256 each, out 512 and 64."""
    gm, _ = after((*BEFORE, BucketGradients(bucket_bytes=800)), Attention(), hidden_states())
    assert buckets(gm) == [["query_weight", "key_weight"], ["value_weight", "out_weight"], ["out_bias"]]


def test_a_parameter_above_the_limit_has_a_bucket_of_its_own() -> None:
    gm, _ = after((*BEFORE, BucketGradients(bucket_bytes=300)), Attention(), hidden_states())
    assert buckets(gm) == [["query_weight"], ["key_weight"], ["value_weight"], ["out_weight"], ["out_bias"]]


class Mixed(nn.Module):
    """Parameters of two dtypes in turn, the last registered used first."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Parameter(torch.randn(8, 8, dtype=torch.float64))
        self.narrow = nn.Parameter(torch.randn(8, dtype=torch.float32))
        self.first = nn.Parameter(torch.randn(8, 8, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.linear(x, self.first) * self.narrow
        query = x.view(2, 8, 4, 2).transpose(1, 2)
        out = functional.scaled_dot_product_attention(query, query, query)
        return functional.linear(out.transpose(1, 2).reshape(2, 8, 8), self.last).sin().mean()


def test_dtypes_have_buckets_of_their_own_in_order_of_use() -> None:
    gm, _ = after((*BEFORE, BucketGradients()), Mixed(), hidden_states())
    assert sorted(buckets(gm)) == [["first", "last"], ["narrow"]]
    reference, ranks, _ = on_ranks(Mixed(), hidden_states(), num_ranks=4)
    assert_ranks_equal_one_device(reference, ranks, 1e-6)


def test_frozen_parameters_are_in_no_bucket() -> None:
    model = Attention()
    model.key.requires_grad_(False)
    gm, _ = after((*BEFORE, BucketGradients()), model, hidden_states())
    assert buckets(gm) == [["query_weight", "value_weight", "out_weight", "out_bias"]]


def test_what_is_gathered_stands_one_bucket_earlier() -> None:
    context = replace(a_context(), shard_parameters=True)
    gm, _ = after((*BEFORE, BucketGradients(bucket_bytes=800)), Attention(), hidden_states(), context=context)
    nodes = list(gm.graph.nodes)
    gathers = [node for node in nodes if is_redistribute(node) and set(annotations.note(node).placements) == {R}]
    gathers = [node for node in gathers if all(x.op == "placeholder" for x in annotations.operands(node))]
    assert [[x.name for x in annotations.operands(node)] for node in gathers] == [
        ["query_weight", "key_weight"],
        ["value_weight", "out_weight"],
        ["out_bias"],
    ]

    def first_read(gather: fx.Node) -> int:
        return min(nodes.index(reader) for picked in gather.users for reader in picked.users)

    first, second, third = gathers
    assert nodes.index(first) < nodes.index(second) < first_read(first)
    assert nodes.index(third) < first_read(second)
    assert first_read(first) < nodes.index(third)
