"""Masks through strategies that cut queries, heads or batch: outputs and gradients are one device's for every mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from sptransform.engine.strategy import Strategy
from sptransform.sharding.partition import Partition
from sptransform.strategies.ring import AllGatherKV, Ring
from sptransform.strategies.ulysses import Ulysses
from sptransform.strategies.usp import USP
from tests.passes.masks import BANDS, LEARNED, LEARNED_WHOLE, LENGTH, PROGRAMS, RING, WHOLE, attend, causal, heads
from tests.passes.normalize.test_attend_by_position import packed, window
from tests.support.equality import assert_equal_to_one_device, run_one_device, worst_error
from tests.support.graphs import Run, assert_ranks_equal_one_device, nodes_of, run_once
from tests.support.models import MODELS
from tests.support.rewritten import Asked, function_on_ranks, on_pretended_ranks

STRATEGIES = (Ring(), Ring("contiguous"), AllGatherKV(), USP(2, 2), Ulysses(), Ulysses("batch"))


def runs(function: Callable[..., Tensor], inputs: list[Any], asked: Asked) -> tuple[Run, list[Run]]:
    """One device and every rank, on the same inputs."""
    ranks = function_on_ranks(function, inputs, asked)
    # not fused: the backward of torch's CPU kernel is wrong for a row of scores that are all the lowest number
    with sdpa_kernel(SDPBackend.MATH):
        reference = run_once(function, inputs)
    return reference, ranks.run(lambda graph: run_once(graph.graph_module, graph.inputs))


def asked_of(index: int) -> Asked:
    """The strategies take turns."""
    strategy = STRATEGIES[index % len(STRATEGIES)]
    return Asked(4 if isinstance(strategy, USP) else 2 + index % 3, strategy)


SOME_BANDS = ("key <= query", "diagonal", "window", "two sides", "keys ahead only")
MASKS = {**{name: (BANDS[name][0], []) for name in SOME_BANDS}, **PROGRAMS, **WHOLE}


@pytest.mark.parametrize(("name", "asked"), [(name, asked_of(i)) for i, name in enumerate(MASKS)], ids=str)
def test_masks(name: str, asked: Asked) -> None:
    """Those of which is known how they are read, padding that leaves rows without a key among them."""
    mask, inputs, *_ = MASKS[name]
    torch.manual_seed(0)

    def function(*inputs: Tensor) -> Tensor:
        return attend(mask, *inputs).pow(2)

    assert_ranks_equal_one_device(*runs(function, [heads(), heads(), heads(), *inputs], asked))


@pytest.mark.parametrize("make", [packed, window], ids=["llama, packed", "mistral"])
def test_models_with_masks(make: Callable[[], Any]) -> None:
    """Documents packed into one sequence, and a sliding window, as Hugging Face's models have them."""
    torch.manual_seed(0)
    model, inputs = make()
    reference = run_one_device(model, inputs)
    plain = {name: x for name, x in inputs.items() if name != "position_ids"}
    if make is window:
        model.config.sliding_window = None
    model.zero_grad()
    assert worst_error(reference, run_one_device(model, plain))[1] > 1e-3  # the mask matters
    model.zero_grad()
    if make is window:
        model.config.sliding_window = 8
    asked = [Asked(2, Ring()), Asked(2, AllGatherKV()), Asked(4, USP(2, 2))]
    for ranks in on_pretended_ranks(model, inputs, asked).values():
        for result in ranks.results():
            assert_equal_to_one_device(reference, result, MODELS["llama"].tolerance)


@pytest.mark.covering(ways=1)
@pytest.mark.parametrize("num_keys", [4, 9])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_attention_to_another_sequence(strategy: Strategy, num_keys: int) -> None:
    """Keys of a sequence of another length, once all of them and once those up to the query's position."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(2, num_keys, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, 16, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, memory: Tensor, weight: Tensor) -> Tensor:
        query = x.unflatten(-1, (4, 2)).transpose(1, 2)
        key, value = (memory @ weight).unflatten(-1, (2, 4, 2)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value)
        attended = functional.scaled_dot_product_attention(attended, key, value, is_causal=True)
        return attended.transpose(1, 2).flatten(2).pow(2)

    num_ranks = 4 if isinstance(strategy, USP) else 3
    assert_ranks_equal_one_device(*runs(function, [x, memory, weight], Asked(num_ranks, strategy)))


@pytest.mark.parametrize(("mask", "folded"), [(causal, True), (None, False), (lambda: ~causal(), False)])
def test_only_causal_attention_is_laid_out_in_zigzag(mask: Callable[[], Tensor] | None, folded: bool) -> None:
    form = Partition.zigzag if folded else Partition.contiguous
    for strategy in (Ring(), AllGatherKV()):
        ranks = function_on_ranks(lambda *x: attend(mask, *x), [heads(), heads(), heads()], Asked(2, strategy))
        (node,) = nodes_of(ranks.graphs[0].graph_module, RING)
        assert Partition.parse(node.kwargs["queries"]) == form(LENGTH, 2)


P, SIZE = 0.4, 12


@pytest.mark.parametrize(
    "asked", [Asked(3, Ring()), Asked(2, AllGatherKV("contiguous")), Asked(4, USP(2, 2)), Asked(2, Ulysses())], ids=str
)
def test_dropout_of_attention(asked: Asked) -> None:
    """What was dropped is read off one run; autograd of the definition then gives outputs and gradients of another."""
    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(query, key, value, dropout_p=P, is_causal=True)

    def run(value: Tensor, seed: int) -> Run:
        inputs = [query, key, value.detach().requires_grad_()]
        first, *others = function_on_ranks(function, inputs, asked).run(
            lambda graph: run_once(graph.graph_module, graph.inputs), seed=seed
        )
        assert_ranks_equal_one_device(first, others)  # all have the whole
        return first

    torch.manual_seed(0)
    shape = (2, 4, SIZE, SIZE)
    query, key, value = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3))
    eye = torch.eye(SIZE, dtype=torch.float64).expand(shape)
    kept = run(eye, seed=1).outputs[0] != 0
    hidden = torch.ones(SIZE, SIZE, dtype=torch.bool).triu(1)
    exact = (query @ key.mT * SIZE**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)
    out = (exact * kept / (1 - P)) @ value
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    found = run(value, seed=1)
    assert_ranks_equal_one_device(Run([out.detach()], list(grads)), [found])
    assert torch.equal(found.outputs[0], run(value, seed=1).outputs[0])
    assert not torch.equal(found.outputs[0], run(value, seed=2).outputs[0])
    assert abs(float(kept[:, :, ~hidden].double().mean()) - (1 - P)) < 0.06
    # neither heads nor batches nor queries, wherever they are, drop alike
    for rows in (kept.transpose(0, 1).flatten(1), kept.flatten(1), kept[..., : SIZE // 2].movedim(2, 0)[6:].flatten(1)):
        assert len(rows.unique(dim=0)) == len(rows)


@pytest.mark.covering(ways=1)
@pytest.mark.parametrize("strategy", [Ring(), AllGatherKV(), USP(2, 2)], ids=str)
@pytest.mark.parametrize(
    "mask",
    [
        lambda x: (x.sum(-1) > 0)[:, None, None, :],
        lambda x: x.detach().mean(-1)[:, None, :, None] + x.detach().mean(-1)[:, None, None, :],
        lambda x: (x.mean(-1) * 2).detach()[:, None, None, :],
    ],
    ids=["compared", "detached first", "detached last"],
)
def test_masks_computed_from_trainable_tensors(mask: Callable[[Tensor], Tensor], strategy: Strategy) -> None:
    """The mask has no gradient, though what it is read from has one: of other uses only."""
    torch.manual_seed(0)
    x = torch.randn(2, LENGTH, 8, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        query = x.unflatten(-1, (4, 2)).transpose(1, 2)
        return functional.scaled_dot_product_attention(query, query, query, mask(x)).pow(2)

    assert_ranks_equal_one_device(*runs(function, [x], Asked(4, strategy)))


@pytest.mark.covering(ways=2)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("name", LEARNED)
def test_learned_masks(name: str, num_ranks: int, strategy: Strategy) -> None:
    """Gradients of what a mask is computed from, summed over ranks where all ranks have it."""
    mask, inputs, *_ = LEARNED[name]
    torch.manual_seed(0)

    def function(*inputs: Tensor) -> Tensor:
        return attend(mask, *inputs).pow(2)

    asked = Asked(4 if isinstance(strategy, USP) else num_ranks, strategy)
    reference, ranks = runs(function, [heads(), heads(), heads(), *inputs], asked)
    assert all(grad.count_nonzero() for grad in reference.grads if grad is not None)
    assert_ranks_equal_one_device(reference, ranks)


@pytest.mark.covering(ways=1)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("name", LEARNED_WHOLE)
def test_learned_masks_that_cannot_be_read(name: str, strategy: Strategy) -> None:
    mask, inputs = LEARNED_WHOLE[name]
    torch.manual_seed(0)

    def function(*inputs: Tensor) -> Tensor:
        return attend(mask, *inputs).pow(2)

    asked = Asked(4 if isinstance(strategy, USP) else 2, strategy)
    assert_ranks_equal_one_device(*runs(function, [heads(), heads(), heads(), *inputs], asked))
