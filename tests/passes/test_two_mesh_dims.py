"""MergeGradientSums and RestoreOutputOrder: what is put right once both mesh dims are distributed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional

from sptransform.graph import notes
from sptransform.graph.printer import text
from sptransform.sharding.mesh import PRETENDED_GROUP
from sptransform.strategies.usp import USP
from tests.support.rewritten import Asked, function_on_ranks

sp = torch.ops.sptransform


def attend(x: Tensor, weight: Tensor) -> Tensor:
    heads = functional.linear(x, weight).unflatten(-1, (4, 2)).transpose(1, 2)
    return functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(1, 2).flatten(2)


def rewritten(length: int, layout: str = "zigzag") -> fx.Graph:
    torch.manual_seed(0)
    inputs = [torch.randn(1, length, 8), torch.randn(8, 8, requires_grad=True)]
    ranks = function_on_ranks(attend, inputs, Asked(4, USP(2, 2, layout)), outputs="dtensor")
    return ranks.graphs[0].graph_module.graph


@pytest.mark.parametrize(
    ("length", "groups"),
    [(16, [PRETENDED_GROUP]), (13, [f"{PRETENDED_GROUP}_inner", f"{PRETENDED_GROUP}_outer"])],
)
def test_gradients_are_summed_once_where_shares_are_even(length: int, groups: list[str]) -> None:
    nodes = rewritten(length).find_nodes(op="call_function", target=sp.replicate.default)
    assert [node.args[1] for node in nodes] == groups
    assert [notes.note(node).mesh.group for node in nodes] == groups


@pytest.mark.parametrize(
    ("length", "layout", "groups"),
    [
        (16, "zigzag", [PRETENDED_GROUP]),
        (16, "contiguous", []),
        (13, "zigzag", [f"{PRETENDED_GROUP}_outer"]),
    ],
)
def test_one_exchange_brings_back_the_order(length: int, layout: str, groups: list[str]) -> None:
    nodes = rewritten(length, layout).find_nodes(op="call_function", target=sp.repartition.default)
    assert [node.args[-1] for node in nodes] == groups


def test_what_is_printed_marks_both_mesh_dims() -> None:
    printed = text(rewritten(16).nodes, is_local=True)
    assert ": f32[1,4@outer@inner,8] = aten.linear(" in printed
    assert ": f32[1,2@inner,8@outer,2], " in printed, "of attention: heads on the inner dim, a ring on the outer"
    assert "f32[8,8] R = getitem(%replicate" in printed, "a bucket of both dims"
