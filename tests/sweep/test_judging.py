"""Architectures against one device: what is exact is found exact, and what is not, wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from sptransform.sweep import judging
from sptransform.sweep.judging import judged, step
from sptransform.sweep.one_device import Built, NotBuilt, built
from sptransform.sweep.records import Record, Status
from sptransform.sweep.registries import FAMILIES, Architecture, architectures
from sptransform.testing.equality import Result
from sptransform.testing.pretended import Asked, Runnable
from sptransform.testing.rounding import put_in_double
from tests.support.graphs import dynamo_graph

TWO = [Asked(2, "ulysses")]
ALL = [Asked(n, name) for name in ("ulysses", "ring", "megatron") for n in (2, 3)]
QUICK = ("LlamaForCausalLM",)
SLOW = (
    "BertForMaskedLM", "T5ForConditionalGeneration", "ViTForImageClassification", "ASTForAudioClassification",
    "Qwen3ForCausalLM",
)  # fmt: skip
DIFFUSION = ("FluxTransformer2DModel", "SD3Transformer2DModel", "PixArtTransformer2DModel", "WanTransformer3DModel")


def named(name: str, *families: str) -> Architecture:
    (found,) = (each for each in architectures(families) if each.name == name)
    return found


def statuses(records: Iterator[Record]) -> dict[str, str]:
    return {f"{r.strategy} on {r.ranks}": f"{r.status.value} {r.reason}".strip() for r in records}


def test_an_architecture_is_exact() -> None:
    assert statuses(judged(named(QUICK[0], "causal-lm"), TWO)) == {"ulysses on 2": "exact"}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_the_fixed_part(name: str) -> None:
    found = list(judged(named(name, *FAMILIES[:-1]), ALL))
    assert len(found) == len(ALL)
    for record in found:
        assert record.by_nature, f"{record.strategy} on {record.ranks}: {record.status.value} {record.reason}"


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFUSION)
def test_the_fixed_part_of_diffusers(name: str) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'sptransform[sweep]'")
    for record in judged(named(name, "diffusion"), ALL):
        assert record.status in (Status.EXACT, Status.GATHERED), f"{record.strategy}: {record.reason}"


@pytest.mark.slow
def test_a_small_mistake_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is moved by more than rounding, the graph in float64 with it."""

    def moved(architecture: Architecture) -> Built:
        model = built(architecture)
        return replace(model, reference=replace(model.reference, loss=model.reference.loss * (1 + 1e-5)))

    def shifted(graph: Runnable) -> Result:
        result = step(graph)
        return replace(result, loss=result.loss * (1 + 1e-8 * (graph.context is None)))  # one device has no context

    monkeypatch.setattr(judging, "built", moved)
    monkeypatch.setattr(judging, "step", shifted)
    (record,) = judged(named("BertForMaskedLM", "masked-lm"), TWO)
    assert record.status is Status.WRONG and "loss differs" in record.reason


def test_what_does_not_run_on_one_device_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(architecture: Architecture) -> Built:
        raise NotBuilt(0, "ImportError: no such library")

    monkeypatch.setattr(judging, "built", refuse)
    (record,) = judged(Architecture("transformers", "image", "Model"), TWO)
    assert (record.status, record.reason) == (Status.NOT_BUILT, "ImportError: no such library")


def test_float32_is_put_in_double() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return (x.float() + torch.ones(4, dtype=torch.float32)).softmax(-1, dtype=torch.float32).to(torch.float32)

    graph = dynamo_graph(model, torch.randn(4, dtype=torch.float64))
    put_in_double(graph.graph_module)
    (found,) = graph.graph_module(*graph.inputs)
    assert found.dtype == torch.float64
