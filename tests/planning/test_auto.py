"""``Auto`` takes what an exhaustive search finds, says why, and all ranks take the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import fx

import sptransform
from sptransform import USP, AllGatherKV, Auto, Ring, Ulysses, UsageError
from sptransform.compiler.options import Options
from sptransform.compiler.rewrite import Rewritten, rewritten_for, while_captured
from sptransform.compiler.trials import trials
from sptransform.cost.hardware import hardware_names
from sptransform.cost.read import step_of
from sptransform.cost.records import Step
from sptransform.cost.simulate import simulate
from sptransform.engine.strategy import Strategy
from sptransform.planning import auto, judged
from sptransform.planning.auto import hardware_of_device
from sptransform.sharding.mesh import Mesh
from tests.support.gloo_pool import get_pool
from tests.support.layers import meta_layer
from tests.support.shapes import build_shape

pytestmark = pytest.mark.timeout(240)
POINTS = 200


def considered(num_ranks: int) -> list[Strategy]:
    """Written by hand: all that one mesh dim of so many ranks allows."""
    usps = [USP(ulysses=u, ring=num_ranks // u) for u in range(2, num_ranks) if num_ranks % u == 0]
    return [Ulysses(), Ring(), AllGatherKV(), *usps]


@cache
def graphs(heads: int, key_heads: int, tokens: int, num_ranks: int) -> Callable[[Strategy], Rewritten]:
    """A layer's graph under each strategy, made once."""
    sizes = {"width": 64, "heads": heads, "key_heads": key_heads, "dim": 64, "hidden": 128}
    model, inputs = meta_layer(1, tokens, sizes)
    model, inputs = sptransform.compiler.fake_models.without_meta(model, inputs)
    options = Options(outputs="loss")

    def use(gm: fx.GraphModule, given: list[Any]) -> dict[Strategy, Rewritten]:
        trial = trials(rewritten_for, gm, given, options, Mesh.pretended(num_ranks))
        return {strategy: trial(strategy, (num_ranks,), 0) for strategy in considered(num_ranks)}

    return while_captured(model, use, *inputs).__getitem__


steps: dict[int, Step] = {}


def step_once(rewritten: Rewritten, **copies: Any) -> Step:
    if id(rewritten) not in steps:
        steps[id(rewritten)] = step_of(rewritten)
    return steps[id(rewritten)]


@pytest.mark.slow
def test_it_takes_what_an_exhaustive_search_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judged, "step_of", step_once)
    draw = random.Random(0)
    shapes = [(8, 8), (8, 2), (16, 4), (4, 1)]
    models = [(*draw.choice(shapes), draw.choice([1024, 8192, 131072]), draw.choice([2, 4, 8])) for _ in range(12)]
    taken = set()
    for _ in range(POINTS):
        *model, num_ranks = draw.choice(models)
        hardware = draw.choice(hardware_names())
        graph = graphs(*model, num_ranks)
        found = {strategy: step_once(graph(strategy)) for strategy in considered(num_ranks)}
        peaks = sorted(step.peak_bytes() for step in found.values())
        memory = draw.choice([None, peaks[-1], peaks[len(peaks) // 2], peaks[0] // 2])
        fits = [s for s, step in found.items() if memory is None or step.peak_bytes() <= memory]
        if fits:
            best = min(simulate(found[strategy], hardware).seconds for strategy in fits)
        choice = Auto(hardware, memory).choice_of(
            lambda strategy, shape, rank, graph=graph: graph(strategy), Mesh.pretended(num_ranks), {}
        )
        taken.add(type(choice.chosen.strategy))
        if fits:
            assert choice.chosen.strategy in fits
            assert simulate(found[choice.chosen.strategy], hardware).seconds == best, (model, num_ranks, hardware)
        else:
            assert choice.chosen.peak_bytes == peaks[0]
            assert "none fits" in choice.reason
    assert len(taken) > 2  # else nothing was decided


@pytest.mark.slow
def test_without_hardware_bytes_decide_and_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = build_shape(8, 2, 1, 64, False)
    explanation = sptransform.explain(model, "auto", inputs, world_size=4)
    sent = {
        strategy: sptransform.explain(model, strategy, inputs, world_size=4).bytes_sent() for strategy in considered(4)
    }
    assert explanation.bytes_sent() == min(sent.values())
    assert "no hardware is known, so bytes decide" in explanation.reason and explanation.reason in str(explanation)
    assert explanation.to_dict()["reason"] == explanation.reason


@pytest.mark.slow
def test_the_crossing_is_a_formula_in_words() -> None:
    """A ring sends 2K (N-1), Ulysses 2 (H+K) (1-1/N): with 4 query heads a key head they meet at N = 5."""
    auto = Auto()
    model, inputs = build_shape(32, 8, 1, 64, False, num_layers=1)
    explanation = sptransform.explain(model, auto, inputs, world_size=8)
    assert explanation.strategy == str(Ulysses())
    assert "sends fewer bytes than" in auto.reason and "from N = " in auto.reason, auto.reason


def loss_of_auto(rank: int, num_ranks: int) -> tuple[str, float, float]:
    """What a worker does: the strategy taken, its loss, and that of one device."""
    model, inputs = build_shape(8, 2, 2, 64, False)
    alone = float(model(**inputs).detach())
    auto = Auto(hardware="a100-nvlink")
    sptransform.parallelize(model, auto, backend="aot_eager")
    loss = model(**inputs)
    loss.backward()
    return str(auto.choices[-1].chosen.strategy), float(loss.detach()), alone


@pytest.mark.slow
def test_ranks_take_the_same_and_run_it() -> None:
    found = get_pool(2).run(loss_of_auto, timeout=200)
    assert len({name for name, *_ in found}) == 1
    for _, loss, alone in found:
        assert loss == pytest.approx(alone, abs=1e-12)


def losses_of_auto(rank: int, num_ranks: int, mode: str) -> list[tuple[float, float]]:
    """What a worker does: the loss under "auto" and on one device, at lengths of which Dynamo leaves the later open."""
    torch._dynamo.reset()
    model, _ = build_shape(8, 2, 2, 64, False)
    inputs = [build_shape(8, 2, 2, tokens, False)[1] for tokens in (64, 128)]
    alone = [float(model(**each).detach()) for each in inputs]
    if mode == "plain":
        model = torch.compile(model, backend="sptransform", options={"strategy": "auto", "backend": "aot_eager"})
    else:
        sptransform.parallelize(model, "auto", backend="aot_eager", shard_parameters=mode == "in parts")
    return [(float(model(**each).detach()), one) for each, one in zip(inputs, alone, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["whole", "in parts", "plain"])
def test_open_lengths_and_parameters_in_parts_are_as_on_one_device(mode: str) -> None:
    for losses in get_pool(2).run(losses_of_auto, mode, timeout=200):
        for loss, alone in losses:
            assert loss == pytest.approx(alone, abs=1e-12)


def test_it_is_a_strategy_of_the_plain_backend() -> None:
    assert Options.of({"strategy": "auto"}).strategy == Auto()


@pytest.mark.parametrize(
    ("device", "num_ranks", "file"),
    [
        ("NVIDIA H100 80GB HBM3", 64, "h100-ib"),
        ("NVIDIA H100 PCIe", 8, None),
        ("NVIDIA A100-SXM4-80GB", 8, "a100-nvlink"),
        ("NVIDIA A100 80GB PCIe", 4, "a100-pcie"),
        ("NVIDIA GeForce RTX 4090", 8, "4090-pcie"),
        ("NVIDIA GeForce RTX 4090", 16, None),
        ("Tesla T4", 8, None),
    ],
)
def test_a_device_has_a_file_if_its_links_reach_all_ranks(device: str, num_ranks: int, file: str | None) -> None:
    found = hardware_of_device(device, num_ranks)
    assert (found and found.name) == file


@pytest.mark.parametrize(
    "arguments", [{"memory": 0}, {"memory": "all"}, {"megatron": 1}, {"hardware": "abacus"}], ids=str
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Auto(**arguments)


def test_none_of_them_can_run_a_model_without_a_sequence() -> None:
    with pytest.raises(UsageError, match="no strategy can run this model"):
        sptransform.explain(torch.nn.Linear(4, 4), "auto", (torch.ones(3, 4),), world_size=2)


@pytest.mark.parametrize("hardware", [None, "h100-ib"])
def test_ranks_with_and_without_hardware_ask_for_devices_alike(
    monkeypatch: pytest.MonkeyPatch, hardware: str | None
) -> None:
    """Ranks that are given different hardware get an error at the first call; none may wait here for the others."""
    asked = []
    monkeypatch.setattr(auto, "_device_of_all", asked.append)
    monkeypatch.setattr(Strategy, "mesh_of", lambda strategy, device_mesh: Mesh.pretended(2))
    Auto(hardware).mesh_of(None)
    assert len(asked) == 1
