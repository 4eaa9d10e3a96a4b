"""Megatron TP-SP on real ranks: parameters are DTensors, of which each rank keeps, trains and saves its part.

Models of one layer where two would say no more: compiling is what takes the time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import sptransform
from sptransform import USP, MegatronSP, Strategy, Ulysses, UsageError
from tests.support.collective_counts import by_message
from tests.support.equality import Result, assert_equal_to_one_device, one_device, run_one_device, run_parallel
from tests.support.gloo_pool import get_pool
from tests.support.models import MODELS, Inputs, build
from tests.support.tiers import tiered

pytestmark = pytest.mark.timeout(300)

RANKS = dict.fromkeys(MODELS, (2,)) | {"gpt2": (3,), "llama_mha_kv2": (4,), "sdpa_transformer": (2, 3, 4)}
# lockstep has them all
CASES = [(name, n) for name, sizes in RANKS.items() for n in sizes]
INDUCTOR_TOLERANCE = 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("name", "world_size"), CASES)
def test_equals_one_device(name: str, world_size: int) -> None:
    for result in get_pool(world_size).run(run_parallel, name, "megatron", "aot_eager", layers=1, timeout=180):
        assert_equal_to_one_device(one_device(name, layers=1), result, MODELS[name].tolerance)
        assert sum(collective.sent_bytes for collective in result.forward) > 0


@pytest.mark.slow
@pytest.mark.inductor
def test_equals_one_device_under_inductor() -> None:
    for result in get_pool(2).run(run_parallel, "llama", "megatron", "inductor", torch.float32, 1, timeout=240):
        assert_equal_to_one_device(one_device("llama", torch.float32, 1), result, INDUCTOR_TOLERANCE)


@pytest.mark.slow
def test_parameters_in_parts_under_ring() -> None:
    for result in get_pool(3).run(run_parallel, "gpt2", "ring", "aot_eager", shard_parameters=True, timeout=180):
        assert_equal_to_one_device(one_device("gpt2"), result, MODELS["gpt2"].tolerance)


Total = dict[str, tuple[int, int]]


def total(messages: Iterable[tuple[str, int, int]]) -> Total:
    """Kind -> number of messages, bytes."""
    found: Total = {}
    for kind, count, num_bytes in messages:
        before = found.get(kind, (0, 0))
        found[kind] = before[0] + count, before[1] + num_bytes
    return found


Sent = tuple[Result, Total, Total]


def sent_and_explained(
    rank: int, world_size: int, name: str, strategy: Any, options: dict[str, Any], mesh: DeviceMesh | None = None
) -> Sent:
    """A step of a model of one layer, what it sent, and what was explained of it before."""
    model, inputs = build(name, layers=1)
    ranks = world_size if mesh is None else tuple(mesh.shape)
    explanation = sptransform.explain(model, strategy, inputs, world_size=ranks, rank=rank, **options)
    result = run_parallel(rank, world_size, name, strategy, "aot_eager", layers=1, mesh=mesh, **options)
    explained = ((c.kind, c.count, c.bytes_sent) for c in explanation.collectives)
    return result, total(by_message([*result.forward, *result.backward])), total(explained)


def assert_sent_as_explained(ranks: list[Sent], name: str) -> None:
    for result, sent, explained in ranks:
        assert_equal_to_one_device(one_device(name, layers=1), result, MODELS[name].tolerance)
        assert sent == explained


@pytest.mark.parametrize(
    ("name", "strategy", "options"),
    tiered(
        [
            ("llama_nocache", MegatronSP(), {}),
            ("llama_nocache", MegatronSP(regather=False), {}),
            ("gpt2", MegatronSP(), {}),
            ("bert", Ulysses(), {"shard_parameters": True}),
        ],
        quick=[("llama_nocache", MegatronSP(), {})],
    ),
    ids=str,
)
def test_what_is_explained_is_sent(name: str, strategy: Strategy, options: dict[str, Any]) -> None:
    assert_sent_as_explained(get_pool(2).run(sent_and_explained, name, strategy, options, timeout=180), name)


@pytest.mark.slow
def test_parameters_in_parts_over_two_mesh_dims() -> None:
    """Under USP by the ring's ranks, and each part by those of Ulysses: gathered in turn."""
    options = {"shard_parameters": True}
    ranks = get_pool(4).run(sent_and_explained, "bert", USP(2, 2), options, timeout=180)
    assert_sent_as_explained(ranks, "bert")


# --- what a rank keeps ----------------------------------------------------------------------------------------


def kept(rank: int, world_size: int, early: bool) -> dict[str, tuple[int, int, int, int]]:
    """Of every parameter: its size, and how much of it, its gradient and its optimizer state is here."""
    model, inputs = build("llama_nocache", layers=1)
    names = list(model.state_dict())
    sptransform.parallelize(model, "megatron", backend="aot_eager", inputs=inputs if early else None)
    optimizer = torch.optim.AdamW(model.parameters())
    run_one_device(model, inputs)
    optimizer.step()
    assert list(model.state_dict()) == names
    found = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]["exp_avg"]
        local = [x.to_local().numel() for x in (parameter, parameter.grad, state)]
        found[name] = (parameter.numel(), *local)
    return found


@pytest.mark.parametrize("early", tiered([True, False], quick=[False]))
def test_every_rank_keeps_its_share(early: bool) -> None:
    """Vocabulary of 97 over 2 ranks is 49 and 48; all else is cut evenly, but for the norms, which are whole."""
    for found in get_pool(2).run(kept, early, timeout=180):
        for name, (whole, *local) in found.items():
            expected = whole if "norm" in name else whole / 2
            assert all(abs(own - expected) <= 0.02 * expected for own in local), name


class Tied(nn.Module):
    """A vocabulary that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(32, 8), nn.Linear(8, 32, bias=False)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def tied_on_meta(rank: int, world_size: int) -> tuple[int, bool, Tensor, Tensor]:
    """A model that is cut on ``meta``, and given memory and values afterwards."""
    torch.manual_seed(0)
    source, ids = Tied().double(), torch.randint(32, (2, 8))
    with torch.device("meta"):
        model = Tied().double()
    model.head.weight = model.tokens.weight
    sptransform.parallelize(model, "megatron", backend="aot_eager", inputs=(ids,))
    model.to_empty(device="cpu")
    model.head.weight = model.tokens.weight  # to_empty gives each name a tensor of its own
    for name, parameter in model.named_parameters():
        whole = source.get_parameter(name)
        (how,) = parameter.placements
        part = whole.chunk(world_size, how.dim)[rank] if how.is_shard() else whole
        with torch.no_grad():
            parameter.to_local().copy_(part)
    loss = model(ids)
    loss.backward()
    reference = run_one_device(source, {"ids": ids})
    grad = model.tokens.weight.grad
    return grad.to_local().shape[0], model.head.weight is model.tokens.weight, grad.full_tensor(), reference.grads[
        "tokens.weight"
    ]


def test_tied_and_on_meta() -> None:
    for rows, is_tied, grad, expected in get_pool(2).run(tied_on_meta, timeout=120):
        assert rows == 16 and is_tied
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


def saved(rank: int, world_size: int, strategy: Strategy, options: dict[str, Any]) -> tuple[int, int]:
    """Bytes that autograd saves in a forward, and those of the weights of linears."""
    model, inputs = build("llama_nocache")
    weights = sum(x.numel() * x.element_size() for name, x in model.named_parameters() if "proj" in name)
    sptransform.parallelize(model, strategy, backend="aot_eager", **options)
    found = []

    def note(x: Tensor) -> Tensor:
        found.append(x.numel() * x.element_size())
        return x

    model(**inputs)  # tracing saves tensors of its own
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        model(**inputs).loss.backward()
    return sum(found), weights


@pytest.mark.slow
def test_whole_parameters_are_not_saved() -> None:
    """A linear saves its weight for its backward: now the rank's half of it."""
    parts = get_pool(2).run(saved, Ulysses(), {"shard_parameters": True}, timeout=120)
    whole = get_pool(2).run(saved, Ulysses(), {}, timeout=120)
    for (less, weights), (more, _) in zip(parts, whole, strict=True):
        assert more - less >= weights // 2


@pytest.mark.slow
def test_what_linears_gathered_is_not_saved() -> None:
    """Two linears of a layer, and the head, read [2, 64, 64]; half of it is the rank's own."""
    again = get_pool(2).run(saved, MegatronSP(), {}, timeout=120)
    once = get_pool(2).run(saved, MegatronSP(regather=False), {}, timeout=120)
    for (less, _), (more, _) in zip(again, once, strict=True):
        assert more - less >= 5 * (2 * 64 * 64 * 8) // 2


# --- training, and going on elsewhere -------------------------------------------------------------------------

STEPS = 5


def train(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Inputs) -> list[float]:
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(**inputs)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def parallel_training(
    rank: int, world_size: int, strategy: str, options: dict[str, Any], load: str | None, save: str | None
) -> tuple[list[float], dict[str, Tensor]]:
    model, inputs = build("sdpa_transformer", layers=1)
    inputs_now = {"inputs": inputs} if strategy == "megatron" else {}
    sptransform.parallelize(model, strategy, backend="aot_eager", **options, **inputs_now)
    optimizer = adamw(model)
    if load is not None:
        resume(model, optimizer, load)
    losses = train(model, optimizer, inputs)
    if save is not None:
        parameters, states = get_state_dict(model, optimizer)
        dcp.save({"model": parameters, "optimizer": states}, checkpoint_id=save)
    return losses, {name: x.full_tensor() for name, x in model.named_parameters()}


def resume(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> None:
    parameters, states = get_state_dict(model, optimizer)
    dcp.load({"model": parameters, "optimizer": states}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=parameters, optim_state_dict=states)


def assert_close(got: tuple[list[float], dict[str, Tensor]], losses: list[float], model: nn.Module) -> None:
    assert got[0] == pytest.approx(losses, rel=1e-10)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[1][name], parameter.detach(), rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    ("strategy", "options"),
    tiered([("megatron", {}), ("ulysses", {"shard_parameters": True})], quick=[("megatron", {})]),
    ids=["megatron", "zero"],
)
def test_training_goes_on_elsewhere(strategy: str, options: dict[str, Any], tmp_path: Path) -> None:
    """5 steps on 2 ranks are those of one device; 5 more are, on 3 ranks and in the plain model."""
    model, inputs = build("sdpa_transformer", layers=1)
    optimizer = adamw(model)
    first = train(model, optimizer, inputs)
    middle = copy.deepcopy(model)
    second = train(model, optimizer, inputs)
    folder = str(tmp_path / "checkpoint")
    for got in get_pool(2).run(parallel_training, strategy, options, None, folder, timeout=180):
        assert_close(got, first, middle)
    for got in get_pool(3).run(parallel_training, strategy, options, folder, None, timeout=180):
        assert_close(got, second, model)
    plain, inputs = build("sdpa_transformer", layers=1)
    optimizer = adamw(plain)
    resume(plain, optimizer, folder)
    assert train(plain, optimizer, inputs) == pytest.approx(second, rel=1e-10)
    assert not any(isinstance(parameter, DTensor) for parameter in plain.parameters())


# --- with the rest of PyTorch ----------------------------------------------------------------------------------


def checkpointed_and_generating(
    rank: int, world_size: int, strategy: Any = "megatron", **options: Any
) -> tuple[Result, Tensor]:
    model, inputs = build("llama")
    sptransform.parallelize(model, strategy, backend="aot_eager", **options)
    model.gradient_checkpointing_enable()
    result = run_one_device(model, inputs)
    model.gradient_checkpointing_disable()
    tokens = model.eval().generate(inputs["input_ids"][:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)
    return result, tokens


@pytest.mark.slow
def test_checkpointing_and_generation() -> None:
    assert_trained_and_generated(get_pool(2).run(checkpointed_and_generating, timeout=180))


def assert_trained_and_generated(results: list[tuple[Result, Tensor]]) -> None:
    model, inputs = build("llama")
    expected = model.eval().generate(inputs["input_ids"][:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)
    for result, tokens in results:
        assert_equal_to_one_device(one_device("llama"), result, MODELS["llama"].tolerance)
        assert torch.equal(tokens, expected)


# --- errors ---------------------------------------------------------------------------------------------------


def refused(rank: int, world_size: int, options: dict[str, Any]) -> str:
    model, _ = build("sdpa_transformer")
    try:
        sptransform.parallelize(model, options.pop("strategy", "megatron"), **options)
    except UsageError as error:
        assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
        return str(error)
    return ""


def test_degrees_that_only_the_model_says_share_no_parameters() -> None:
    for text in get_pool(4).run(refused, {"strategy": "usp", "shard_parameters": True}, timeout=60):
        assert "known before the model's heads" in text and "USP(ulysses=.., ring=..)" in text


def test_gradients_of_parts_are_complete() -> None:
    for text in get_pool(2).run(refused, {"grad_sync": False}, timeout=60):
        assert "complete gradients" in text and "grad_sync=False" in text
