"""Context and tensor parallelism on four real ranks: steps as on one device, and what is sent is what is explained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import sptransform
from sptransform import UsageError
from tests.end_to_end.test_megatron_gloo import (
    INDUCTOR_TOLERANCE,
    Sent,
    assert_sent_as_explained,
    assert_trained_and_generated,
    checkpointed_and_generating,
    sent_and_explained,
)
from tests.end_to_end.test_users_precision import assert_no_further_than_one_device, step
from tests.support.equality import (
    ParallelResult,
    Result,
    assert_equal_to_one_device,
    one_device,
    run_one_device,
    run_parallel,
)
from tests.support.gloo_pool import get_pool
from tests.support.models import MODELS, Inputs, build
from tests.support.tiers import tiered

pytestmark = pytest.mark.timeout(300)

STEPS = 3
SHAPE = (2, 2)


def a_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", SHAPE, mesh_dim_names=("cp", "tp"))


def train(model: nn.Module, inputs: Inputs) -> list[float]:
    """Steps of AdamW with clipped gradients; every step's batch is another."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for shift in range(STEPS):
        optimizer.zero_grad()
        batch = {name: x.roll(shift, 1) for name, x in inputs.items()}
        out = model(**batch)
        loss = out if isinstance(out, Tensor) else out.loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def trained(
    rank: int, world_size: int, name: str, kind: str, early: bool, folder: str | None
) -> tuple[list[float], dict[str, Tensor]]:
    model, inputs = build(name, layers=1)
    mesh = a_mesh()
    sptransform.parallelize(model, (kind, "megatron"), mesh=mesh, backend="aot_eager", inputs=inputs if early else None)
    losses = train(model, inputs)
    assert {parameter.device_mesh for parameter in model.parameters()} == {mesh["tp"]}
    if folder is not None:
        dcp.save(get_model_state_dict(model), checkpoint_id=folder)
    return losses, {name: parameter.full_tensor() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "kind", "early"),
    tiered(
        [("sdpa_transformer", "ring", False), ("sdpa_transformer", "ulysses", True), ("bert", "allgather", True)],
        quick=[("sdpa_transformer", "ring", False)],
    ),
)
def test_three_steps_are_those_of_one_device(name: str, kind: str, early: bool, tmp_path: Path) -> None:
    """And what was saved of them is read by the plain model."""
    model, inputs = build(name, layers=1)
    losses = train(model, inputs)
    folder = str(tmp_path / "checkpoint")
    for got, parameters in get_pool(4).run(trained, name, kind, early, folder, timeout=180):
        assert got == pytest.approx(losses, rel=1e-10)
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(parameters[key], parameter.detach(), rtol=1e-9, atol=1e-9, msg=key)
    plain, _ = build(name, layers=1)
    state = get_model_state_dict(plain)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(plain, state)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(plain.get_parameter(key), parameter, rtol=1e-9, atol=1e-9, msg=key)


def run_composed(rank: int, world_size: int, name: str, kind: str, **options: Any) -> ParallelResult:
    backend = options.pop("backend", "aot_eager")
    return run_parallel(rank, world_size, name, (kind, "megatron"), backend, mesh=a_mesh(), **options)


@pytest.mark.inductor
@pytest.mark.slow
def test_equals_one_device_under_inductor() -> None:
    for result in get_pool(4).run(run_composed, "llama", "ring", backend="inductor", dtype=torch.float32, timeout=280):
        assert_equal_to_one_device(one_device("llama", torch.float32), result, INDUCTOR_TOLERANCE)


def composed_and_explained(rank: int, world_size: int, kind: str) -> Sent:
    return sent_and_explained(rank, world_size, "llama_nocache", (kind, "megatron"), {}, a_mesh())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ring", "allgather", "ulysses"])
def test_what_is_explained_is_sent(kind: str) -> None:
    assert_sent_as_explained(get_pool(4).run(composed_and_explained, kind, timeout=180), "llama_nocache")


def returned(rank: int, world_size: int, kind: str, length: int) -> tuple[Result, list[str], Tensor]:
    model, inputs = build("llama_nocache", seq_len=length, layers=1)
    sptransform.parallelize(model, (kind, "megatron"), mesh=a_mesh(), backend="aot_eager")
    out = model(**inputs)
    out.loss.backward()
    grads = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    how = [str(placement) for placement in out.logits.placements] if isinstance(out.logits, DTensor) else []
    whole = out.logits.full_tensor() if isinstance(out.logits, DTensor) else out.logits
    return Result(out.loss.detach(), grads), how, whole.detach()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "length", "how"),
    [("ulysses", 23, ["S(1)", "R"]), ("ring", 64, ["S(1)", "S(2)"]), ("ring", 23, ["S(1)", "R"])],
    ids=str,
)
def test_outputs_and_odd_lengths(kind: str, length: int, how: list[str]) -> None:
    """Logits are cut along the sequence and the vocabulary; after uneven shares of the sequence along that alone."""
    model, inputs = build("llama_nocache", seq_len=length, layers=1)
    logits = model(**inputs).logits
    reference = run_one_device(model, inputs)
    for result, found, whole in get_pool(4).run(returned, kind, length, timeout=180):
        assert_equal_to_one_device(reference, result, MODELS["llama_nocache"].tolerance)
        torch.testing.assert_close(whole, logits, rtol=1e-6, atol=1e-6)
        assert found == how


def recomputed(rank: int, world_size: int, kind: str) -> tuple[Result, Tensor]:
    return checkpointed_and_generating(rank, world_size, (kind, "megatron"), mesh=a_mesh())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ring", "ulysses"])
def test_checkpointing_and_generation(kind: str) -> None:
    assert_trained_and_generated(get_pool(4).run(recomputed, kind, timeout=280))


def narrow(rank: int, world_size: int, where: str, kind: str) -> Result:
    return step("llama", where, (kind, "megatron"), mesh=a_mesh())


@pytest.mark.slow
@pytest.mark.parametrize(("where", "kind"), [("around", "ulysses"), ("inside", "ring"), ("parameters", "allgather")])
def test_mixed_precision(where: str, kind: str) -> None:
    assert_no_further_than_one_device(get_pool(4).run(narrow, where, kind, timeout=280), "llama", where)


def refused(rank: int, world_size: int) -> str:
    model, _ = build("sdpa_transformer")
    with pytest.raises(UsageError) as error:
        sptransform.parallelize(model, ("ring", "megatron"))
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    return str(error.value)


def test_a_mesh_is_asked_for() -> None:
    for text in get_pool(4).run(refused, timeout=60):
        assert "a mesh has a dim for each strategy" in text and "mesh_dim_names=('cp', 'tp')" in text
