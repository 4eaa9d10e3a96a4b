"""The striped layout: loss and gradients of one device, of causal and packed sequences, at any length; one graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sptransform.engine.strategy import Strategy
from sptransform.sharding.partition import Partition
from sptransform.strategies.ring import AllGatherKV, Ring
from sptransform.strategies.usp import USP
from tests.passes.masks import RING
from tests.passes.normalize.test_attend_by_position import packed
from tests.support.equality import assert_equal_to_one_device, run_one_device
from tests.support.graphs import assert_ranks_equal_one_device, nodes_of, run_once
from tests.support.models import MODELS
from tests.support.rewritten import Asked, function_on_ranks, on_pretended_ranks

STRIPED = (Ring("striped"), Ring("striped", block=3), AllGatherKV("striped", block=2), USP(2, 2, "striped", block=2))


def attend(x: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    query, key, value = x.unflatten(-1, (3, 4, 2)).transpose(1, 3).unbind(2)
    attended = functional.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal)
    return attended.transpose(1, 2).flatten(2)


def causal(x: Tensor, documents: Tensor) -> Tensor:
    """Positions enter beside attention: every token is multiplied by its own."""
    return attend(x * torch.arange(1, x.shape[1] + 1)[:, None], is_causal=True).pow(2)


def not_causal(x: Tensor, documents: Tensor) -> Tensor:
    return attend(x).pow(2)


def in_documents(x: Tensor, documents: Tensor) -> Tensor:
    """Causal by data only: the mask compares numbers that are given."""
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return attend(x, same & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()).pow(2)


def shifted(x: Tensor, documents: Tensor) -> Tensor:
    """Each position against the input one further on."""
    return (attend(x, is_causal=True)[:, :-1] - x[:, 1:, :8]).pow(2)


def inputs(length: int) -> list[Tensor]:
    torch.manual_seed(0)
    lengths = torch.tensor([1, length // 3, length - length // 3 - 1])
    documents = torch.arange(3).repeat_interleave(lengths).expand(2, length).contiguous()
    return [torch.randn(2, length, 24, dtype=torch.float64, requires_grad=True), documents]


@pytest.mark.covering(ways=2)
@pytest.mark.parametrize("strategy", STRIPED, ids=str)
@pytest.mark.parametrize("function", [causal, not_causal, in_documents, shifted], ids=lambda f: f.__name__)
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("length", [24, 23, 14])
def test_ranks_equal_one_device(
    length: int, num_ranks: int, function: Callable[..., Tensor], strategy: Strategy
) -> None:
    given = inputs(length)
    asked = Asked(4 if isinstance(strategy, USP) else num_ranks, strategy)
    ranks = function_on_ranks(function, given, asked)
    (node,) = nodes_of(ranks.graphs[0].graph_module, RING)
    layout = Partition.parse(node.kwargs["queries"])
    assert layout == Partition.striped(length, layout.num_ranks, strategy.block) and layout.stripe is not None
    found = ranks.run(lambda graph: run_once(graph.graph_module, graph.inputs))
    assert_ranks_equal_one_device(run_once(function, given), found)


@pytest.mark.slow
def test_packed_documents_of_a_model() -> None:
    """Positions that start over, rotary tables, labels shifted by one: Hugging Face's Llama, packed."""
    torch.manual_seed(0)
    model, given = packed()
    reference = run_one_device(model, given)
    model.zero_grad()
    asked = [
        Asked(3, Ring("striped", block=2)),
        Asked(2, AllGatherKV("striped")),
        Asked(4, USP(2, 2, "striped", block=5)),
        Asked((2, 2), (Ring("striped", block=4), "megatron")),
    ]
    for ranks in on_pretended_ranks(model, given, asked).values():
        for result in ranks.results():
            assert_equal_to_one_device(reference, result, MODELS["llama"].tolerance)


@pytest.mark.parametrize(("length", "block"), [(16, 2), (20, 3), (24, None)])
def test_even_shares_have_one_graph(length: int, block: int | None) -> None:
    """Whole rounds, and a shorter one after them: no rank has its own program."""
    asked = Asked(4, Ring("striped", block=block))
    graphs = function_on_ranks(causal, inputs(length), asked).graphs
    assert all(graph is graphs[0] for graph in graphs)


@pytest.mark.parametrize("strategy", [Ring("striped", block=2), USP(2, 2, "striped")], ids=str)
def test_outputs_come_back_in_order(strategy: Strategy) -> None:
    given = inputs(16)
    ranks = function_on_ranks(causal, given, Asked(4, strategy), outputs="local")
    parts = ranks.run(lambda graph: graph.graph_module(*graph.inputs)[0])
    torch.testing.assert_close(torch.cat(parts, 1), causal(*given), rtol=0, atol=1e-12)
