"""Every strategy on every model and on shapes that ranks do not share evenly: loss and gradients are one device's.

In lockstep, in one process; some of it on real ranks is in `tests/end_to_end/test_strategies_gloo.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sptransform.engine.strategy import Strategy
from sptransform.strategies.megatron import MegatronSP
from sptransform.strategies.ring import AllGatherKV, Ring
from sptransform.strategies.ulysses import Ulysses
from sptransform.strategies.usp import USP
from tests.support.equality import assert_equal_to_one_device, one_device, run_one_device
from tests.support.graphs import assert_ranks_equal_one_device, run_once
from tests.support.models import FLOAT64, MODELS
from tests.support.rewritten import Asked, function_on_ranks, model_on_pretended_ranks, on_pretended_ranks
from tests.support.shapes import build_shape
from tests.support.tiers import tiered

# of 64 tokens: shared evenly, but by models that clip one off
EVERY_MODEL = [Asked(4, Ring()), Asked(2, Ring("contiguous")), Asked(2, AllGatherKV()), Asked(4, USP(2, 2))]
MORE = [Asked(3, Ring()), Asked(3, AllGatherKV("contiguous")), Asked(3, USP(3)), Asked(4, USP())]


def asked_of(name: str) -> list[Asked]:
    return EVERY_MODEL + (MORE if name == "sdpa_transformer" else [])


CASES = [(name, asked) for name in MODELS for asked in asked_of(name)]
# every strategy with a model of its own, and what is asked of one model only
QUICK = [
    ("llama_padded", EVERY_MODEL[0]),
    ("gpt_neox", EVERY_MODEL[1]),
    ("bert", EVERY_MODEL[2]),
    ("qwen3", EVERY_MODEL[3]),
    ("sdpa_transformer", MORE[0]),
    ("sdpa_transformer", MORE[3]),
]


@pytest.mark.parametrize(("name", "asked"), tiered(CASES, quick=QUICK), ids=str)
def test_models(name: str, asked: Asked) -> None:
    (ranks,) = model_on_pretended_ranks(name, [asked]).values()
    for result in ranks.results():
        assert_equal_to_one_device(one_device(name), result, MODELS[name].tolerance)


# tokens, batch, query and key heads
SHAPES = [(63, 1, (7, 1)), (37, 2, (8, 2)), (5, 1, (6, 2)), (3, 2, (3, 1))]
ON_FOUR = [Asked(4, x) for x in (Ring(), AllGatherKV("contiguous"), Ring(kv="allgather"), USP(2, 2))]


@pytest.mark.parametrize(("length", "batch", "heads"), tiered(SHAPES, quick=SHAPES[2:]))
def test_shapes_that_do_not_divide(length: int, batch: int, heads: tuple[int, int]) -> None:
    """Fewer tokens than ranks, fewer key heads than ranks, numbers of heads that the ranks of USP do not divide."""
    model, inputs = build_shape(*heads, batch, length, repeat=batch == 2, num_layers=1)
    reference = run_one_device(model, inputs)
    asked = ON_FOUR[:-1] if length < 5 else ON_FOUR  # two mesh dims ask for two tokens on every rank of the first
    for ranks in on_pretended_ranks(model, inputs, asked).values():
        for result in ranks.results():
            assert_equal_to_one_device(reference, result, FLOAT64)


@pytest.mark.parametrize(("num_heads", "num_key_heads"), tiered([(6, 3), (20, 5)], quick=[(6, 3)]))
def test_ranks_with_equal_numbers_of_heads_may_share_a_key_head(num_heads: int, num_key_heads: int) -> None:
    """Which of its key heads a query head reads then differs from rank to rank, though their shares are equal."""
    model, inputs = build_shape(num_heads, num_key_heads, 1, 8, repeat=False, num_layers=1)
    reference = run_one_device(model, inputs)
    for ranks in on_pretended_ranks(model, inputs, [Asked(2, Ulysses()), Asked(2, MegatronSP())]).values():
        for result in ranks.results():
            assert_equal_to_one_device(reference, result, FLOAT64)


def attend(x: Tensor) -> Tensor:
    heads = x.unflatten(-1, (4, 2)).transpose(1, 2)
    return functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("strategy", "length"),
    [(strategy, length) for strategy in (Ring(), AllGatherKV(), USP(2, 2)) for length in (16, 13, 3)][:-1],
    ids=str,
)
def test_outputs_come_back_in_order(strategy: Strategy, length: int) -> None:
    """However attention was laid out: the ranks' parts, one after the other, are the whole."""
    torch.manual_seed(0)
    x = torch.randn(2, length, 8, dtype=torch.float64)
    ranks = function_on_ranks(attend, [x], Asked(4, strategy), outputs="local")
    parts = ranks.run(lambda graph: graph.graph_module(*graph.inputs)[0])
    if isinstance(strategy, USP) and length % 2:  # cut over the ring only, alike on the ranks that share heads
        assert torch.equal(parts[0], parts[1]) and torch.equal(parts[2], parts[3])
        parts = parts[::2]
    torch.testing.assert_close(torch.cat(parts, 1), attend(x), rtol=0, atol=1e-12)
    assert max(part.shape[1] for part in parts) == -(-length // len(parts))


def last_token(x: Tensor) -> Tensor:
    return attend(x)[:, -1:] * 2


def front(x: Tensor) -> Tensor:
    return attend(x)[:, : x.shape[1] // 4] * 2


def clipped(x: Tensor) -> Tensor:
    return attend(x)[:, 1:] * 2


@pytest.mark.covering(ways=1)
@pytest.mark.parametrize("function", [last_token, front, clipped], ids=lambda function: function.__name__)
@pytest.mark.parametrize("length", [16, 13, 5])
def test_ranks_of_a_mesh_dim_may_be_left_with_nothing(function: Callable[[Tensor], Tensor], length: int) -> None:
    """Then they do otherwise on the second than the rest; what all do together stays alike."""
    torch.manual_seed(0)
    x = torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True)
    for outputs in ("full", "dtensor"):
        ranks = function_on_ranks(function, [x], Asked(4, USP(2, 2)), outputs=outputs)
        runs = ranks.run(lambda graph: run_once(graph.graph_module, graph.inputs))
        if outputs == "full":
            assert_ranks_equal_one_device(run_once(function, [x]), runs)
        else:
            whole = run_once(function, [x]).outputs[0]
            assert torch.equal(runs[0].grads[0], runs[3].grads[0])
            assert {run.outputs[0].shape[0] for run in runs} == {whole.shape[0]}
