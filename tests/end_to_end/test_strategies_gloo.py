"""Rings, gathered keys, two mesh dims on real ranks; all models and shapes: `tests/strategies/test_models.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import sptransform
from sptransform.engine.strategy import Strategy
from sptransform.strategies.ring import AllGatherKV, Ring
from sptransform.strategies.usp import USP
from tests.support.equality import Result, assert_equal_to_one_device, one_device, run_one_device
from tests.support.gloo_pool import get_pool
from tests.support.models import FLOAT64, MODELS, VOCAB, build
from tests.support.tiers import tiered
from tests.support.tiny import attention, attention_with_loss, token_inputs

pytestmark = pytest.mark.timeout(240)


# --- steps ----------------------------------------------------------------------------------------------------


def steps(rank: int, world_size: int, name: str, strategy: Strategy, num_runs: int) -> list[Result]:
    model, inputs = build(name, layers=1)
    sptransform.parallelize(model, strategy, backend="aot_eager")
    results = []
    for _ in range(num_runs):
        model.zero_grad()
        results.append(run_one_device(model, inputs))
    return results


@pytest.mark.parametrize(
    ("name", "strategy", "num_ranks"),
    tiered(
        [
            ("sdpa_transformer", Ring(), 3),
            ("bert", AllGatherKV(regather=True), 2),
            ("sdpa_transformer", USP(2, 2), 4),
            ("llama_padded", Ring("striped", block=5), 3),
        ],
        quick=[("sdpa_transformer", Ring(), 3), ("sdpa_transformer", USP(2, 2), 4)],
    ),
    ids=str,
)
def test_models(name: str, strategy: Strategy, num_ranks: int) -> None:
    """Each step of three is one device's, and the same as the first to the bit, on all ranks."""
    found = get_pool(num_ranks).run(steps, name, strategy, 3, timeout=180)
    for results in found:
        assert_equal_to_one_device(one_device(name, layers=1), results[0], MODELS[name].tolerance)
    for result in (result for results in found for result in results):
        assert torch.equal(result.loss, found[0][0].loss)
        for parameter, grad in result.grads.items():
            assert torch.equal(grad, found[0][0].grads[parameter]), parameter


def compiled(rank: int, world_size: int) -> Result:
    model = sptransform.parallelize(attention_with_loss().float(), Ring(), backend="inductor")
    return run_one_device(model, token_inputs())


@pytest.mark.inductor
@pytest.mark.slow
def test_a_ring_under_inductor() -> None:
    reference = run_one_device(attention_with_loss().float(), token_inputs())
    for result in get_pool(2).run(compiled, timeout=200):
        assert_equal_to_one_device(reference, result, 1e-5)


# --- outputs --------------------------------------------------------------------------------------------------


def tokens(length: int) -> torch.Tensor:
    return torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(0))


def logits(rank: int, world_size: int, length: int) -> dict[str, Any]:
    """Outputs of a ring, and of a mesh of two dims: those of a DTensor are its whole, its part, and its placements."""
    two_dims = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
    asked: dict[str, tuple[Strategy, dict[str, Any]]] = {
        "ring": (Ring(), {}),
        "usp": (USP(), {"mesh": two_dims}),
        "usp, full": (USP(2, 2), {"outputs": "full"}),
    }
    found: dict[str, Any] = {}
    for name, (strategy, options) in asked.items():
        model = sptransform.parallelize(attention(), strategy, backend="eager", **options)
        out = model(tokens(length)).detach()
        if isinstance(out, DTensor):
            found[name] = out.full_tensor(), out.to_local(), out.placements, out.device_mesh.mesh.tolist()
        else:
            found[name] = out
    return found


@pytest.mark.parametrize("length", tiered([16, 13], quick=[13]))
def test_logits_are_in_order(length: int) -> None:
    """Sequences come back in the order of the input, whatever the ranks computed with: cut as DTensor says."""
    expected = attention()(tokens(length)).detach()
    found = get_pool(4).run(logits, length)
    halves = expected.chunk(2, 1)
    if length % 2:  # after uneven shares of the ring, whole on the ranks that share heads
        of_usp, second = [half for half in halves for _ in range(2)], Replicate()
    else:
        of_usp, second = [part for half in halves for part in half.chunk(2, 1)], Shard(1)
    for rank, own in enumerate(found):
        torch.testing.assert_close(own["usp, full"], expected, rtol=0, atol=1e-12)
        for name, parts, placements, ranks in (
            ("ring", expected.chunk(4, 1), (Shard(1),), [0, 1, 2, 3]),
            ("usp", of_usp, (Shard(1), second), [[0, 1], [2, 3]]),
        ):
            whole, part, placed, mesh = own[name]
            torch.testing.assert_close(whole, expected, rtol=0, atol=1e-12)
            torch.testing.assert_close(part, parts[rank], rtol=0, atol=1e-12)
            assert (placed, mesh) == (placements, ranks)


# --- lengths --------------------------------------------------------------------------------------------------


def lengths(rank: int, world_size: int, asked: list[int], strategy: Strategy) -> tuple[list[Result], int]:
    from torch._dynamo.utils import counters

    counters.clear()
    model = sptransform.parallelize(attention_with_loss(), strategy, backend="aot_eager")
    results = []
    for length in asked:
        model.zero_grad()
        results.append(run_one_device(model, {"tokens": tokens(length), "labels": tokens(length)}))
    return results, counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("asked", "strategy", "most"),
    tiered(
        [
            ([16, 32, 24, 8], Ring(), 2),
            ([16, 18, 32], Ring(), 3),
            ([64, 128, 192], Ring("striped"), 2),
            ([64, 21, 128], Ring("striped"), 3),
            ([16, 32], Ring("striped", block=4), 2),
        ],
        quick=[([16, 32, 24, 8], Ring(), 2), ([64, 128, 192], Ring("striped"), 2)],
    ),
    ids=str,
)
def test_lengths(asked: list[int], strategy: Strategy, most: int) -> None:
    """One graph serves all lengths of which all ranks get equal chunks; others are compiled for themselves."""
    for results, num_compiles in get_pool(2).run(lengths, asked, strategy):
        assert num_compiles <= most
        for length, result in zip(asked, results, strict=True):
            inputs = {"tokens": tokens(length), "labels": tokens(length)}
            assert_equal_to_one_device(run_one_device(attention_with_loss(), inputs), result, FLOAT64)
