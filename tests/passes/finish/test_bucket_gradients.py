"""Parameter gradients travel in buckets: of one dtype, of limited size, in the order of first use."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.nn import functional

from sptransform.diagnostics import provenance
from sptransform.graph import dataflow, notes
from sptransform.graph.printer import text
from sptransform.passes import PIPELINE
from sptransform.passes.distribute.localize import Localize
from sptransform.passes.finish.bucket_gradients import BucketGradients
from tests.passes.blocks import Attention, by_repeat_interleave, hidden_states
from tests.support.golden import Golden
from tests.support.graphs import after, assert_ranks_equal_one_device, nodes_of, on_ranks

BEFORE = tuple(PIPELINE)[: [type(step) for step in PIPELINE].index(Localize) + 1]


def buckets(gm: fx.GraphModule) -> list[list[str]]:
    return [
        [producer.name for producer in dataflow.operands(node)]
        for node in nodes_of(gm, torch.ops.sptransform.replicate.default)
    ]


def test_golden(golden: Golden) -> None:
    model, x = Attention(by_repeat_interleave), hidden_states()
    gm, _ = after((*BEFORE, BucketGradients()), model, x)
    golden.check("bucket_gradients", after=text(gm.graph.nodes, is_local=True))


def test_one_bucket() -> None:
    gm, _ = after((*BEFORE, BucketGradients()), Attention(), hidden_states())
    assert buckets(gm) == [["query_weight", "key_weight", "value_weight", "out_weight", "out_bias"]]


def test_a_bucket_stands_for_the_op_that_reads_it_first() -> None:
    """As far as source line and module path go."""
    gm, _ = after((*BEFORE, BucketGradients()), Attention(), hidden_states())
    (bucket,) = nodes_of(gm, torch.ops.sptransform.replicate.default)
    first, *_ = nodes_of(gm, torch.ops.aten.linear.default)
    assert provenance.module_path(bucket) == provenance.module_path(first) == "query"
    assert provenance.source_line(bucket) == provenance.source_line(first) is not None


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


class Pooled(nn.Module):
    """What is pooled runs whole, and is read by what runs whole and by what is sharded: it is moved I -> R too."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.weight = Attention(), nn.Parameter(torch.randn(8, 8, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(x)
        pooled = functional.softmax(x.mean(1, keepdim=True), -1)
        return functional.linear(x + pooled, self.weight).sin().mean() + pooled.square().sum()


def test_what_is_computed_is_in_no_bucket() -> None:
    gm, _ = after((*BEFORE, BucketGradients()), Pooled(), hidden_states())
    assert ["softmax"] in buckets(gm) and sum("softmax" in bucket for bucket in buckets(gm)) == 1
    reference, ranks, _ = on_ranks(Pooled(), hidden_states(), num_ranks=2)
    assert_ranks_equal_one_device(reference, ranks)


def test_a_region_that_has_ended_holds_no_bucket_back() -> None:
    """Position tables are often made without gradients, in front of everything."""

    class Positions(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                table = torch.arange(x.shape[1], device=x.device).unsqueeze(1).sin()
            return super().forward(x + table)

    gm, _ = after((*BEFORE, BucketGradients(bucket_bytes=800)), Positions(), hidden_states())
    assert buckets(gm) == [["query_weight", "key_weight"], ["value_weight", "out_weight"], ["out_bias"]]
    order = list(gm.graph.nodes)
    linears = nodes_of(gm, torch.ops.aten.linear.default)
    first, second, third = nodes_of(gm, torch.ops.sptransform.replicate.default)
    regions = [order.index(node) for node in order if notes.region_of(node) != notes.region_of(order[0])]
    assert max(regions) < order.index(first)
    query, _, value, out = map(order.index, linears)
    assert order.index(first) < query < order.index(second) < value < order.index(third) < out
