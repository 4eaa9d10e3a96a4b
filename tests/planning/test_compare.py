"""``compare``: every strategy is counted as it is on its own, and what blocks one is said with the user's line."""

from __future__ import annotations

import io
import json

import pytest
import rich.console
import torch
from torch import nn

import sptransform
from sptransform import USP, AllGatherKV, Comparison, MegatronSP, Ring, Ulysses, UsageError
from sptransform.cost.read import step_of
from sptransform.planning import beside
from sptransform.planning.candidates import candidates
from tests.support.layers import meta_layer
from tests.support.models import Inputs
from tests.support.shapes import build_shape

pytestmark = pytest.mark.timeout(240)


def shape(layers: int) -> tuple[nn.Module, Inputs]:
    return build_shape(8, 2, 1, 64, False, num_layers=layers)


def test_every_strategy_gets_the_meshes_it_can_have() -> None:
    names = [candidate.name for candidate in candidates((8,))]
    usps = ["usp 2 x 4", "usp 4 x 2"]
    pairs = [f"{first} {n} x megatron {8 // n}" for first in ("ring", "ulysses", "allgather") for n in (4, 2)]
    assert sorted(names) == sorted(["ulysses", "ring", "allgather", *usps, "megatron", *pairs])
    assert [c.name for c in candidates((2, 4), (USP(), Ring(), (Ring(), MegatronSP())))] == [
        "usp 4 x 2",
        "ring 2 x megatron 4",
    ]
    assert [c.strategy for c in candidates((4,), (USP(ring=2), USP(ulysses=2)))] == [USP(ulysses=2, ring=2)]


@pytest.fixture(scope="module")
def four() -> Comparison:
    model, inputs = shape(2)
    strategies = ["ulysses", "ring", (Ulysses(), MegatronSP()), "usp"]
    return sptransform.compare(model, inputs, world_size=4, hardware="h100-nvlink", strategies=strategies)


@pytest.mark.slow
def test_one_core_finds_the_same(four: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "_has_two_cores", lambda: False)
    model, inputs = shape(2)
    strategies = [option.strategy for option in four.options]
    alone = sptransform.compare(model, inputs, world_size=4, hardware="h100-nvlink", strategies=strategies)
    assert alone.to_dict() == four.to_dict()
    assert [option.step for option in alone.options] == [option.step for option in four.options]


def test_it_counts_what_explain_counts(four: Comparison) -> None:
    model, inputs = shape(2)
    for option in four.runnable:
        alone = sptransform.explain(model, option.strategy, inputs, world_size=option.mesh, rank=option.rank)
        assert option.step.bytes_sent() == alone.bytes_sent(), option.name
        assert option.step.messages() == sum(total.count for total in alone.totals), option.name
        assert option.pairs == alone.attended_pairs


def test_the_fastest_comes_first_and_what_is_blocked_last(four: Comparison) -> None:
    times = [option.timeline.seconds for option in four.runnable]
    assert times == sorted(times) and len(times) == 3
    blocked = four.options[-1]
    assert blocked.name == "ulysses 2 x megatron 2"
    assert "share the heads" in blocked.blocked and "  in: " in blocked.blocked
    assert "scaled_dot_product_attention" in blocked.blocked


def test_ranks_share_the_work_of_one_device(four: Comparison) -> None:
    for option in four.runnable:
        assert option.step.flops() * 4 == four.one_device.flops(), option.name


def test_it_is_a_page_and_plain_data(four: Comparison) -> None:
    text = str(four)
    assert "Cannot run this model" in text and "simulated" in text and "usp 2 x 2" in text
    data = json.loads(json.dumps(four.to_dict()))
    assert data["options"][-1]["blocked"] == four.options[-1].blocked
    assert data["options"][0]["seconds"] == four.options[0].timeline.seconds
    console = rich.console.Console(file=io.StringIO(), width=80)
    console.print(four)
    assert "usp 2 x 2" in console.file.getvalue()


def test_without_hardware_it_ranks_by_bytes() -> None:
    model, inputs = meta_layer(1, 64, {"width": 16, "heads": 4, "key_heads": 4, "dim": 4})
    seen = []
    found = sptransform.compare(
        model,
        inputs,
        world_size=2,
        strategies=["ring", "ulysses", AllGatherKV()],
        progress=lambda name, done, of: seen.append((name, done, of)),
    )
    sent = [option.step.bytes_sent() for option in found.options]
    assert sent == sorted(sent) and "Ranked by bytes" in str(found)
    assert seen == [("ring", 0, 3), ("ulysses", 1, 3), ("allgather", 2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ulysses", "ring", "allgather", "megatron"])
def test_equal_layers_count_as_often_as_they_are(strategy: str) -> None:
    model, inputs = shape(6)
    (option,) = sptransform.compare(model, inputs, world_size=4, strategies=[strategy]).options
    step = step_of(sptransform.rewrite(model, strategy, inputs, world_size=4))
    assert option.step.flops() == step.flops()
    assert option.step.parameters == step.parameters
    # parameters are bucketed by what is in the graph, so only the number of messages may differ
    assert option.step.bytes_sent("forward") == step.bytes_sent("forward")
    assert option.step.bytes_sent("backward") == pytest.approx(step.bytes_sent("backward"), rel=0.01)


@pytest.mark.slow
def test_the_busiest_rank_is_shown() -> None:
    model, inputs = shape(2)
    (option,) = sptransform.compare(model, inputs, world_size=3, strategies=["ulysses"]).options
    assert option.rank == option.pairs.index(max(option.pairs)) > 0
    assert option.explanation.rank == option.step.rank == option.rank


class KeysAndValues(nn.Module):
    """Cross-attention as ``nn.MultiheadAttention`` has it: keys and values of one weight, whose halves are parted."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return self.attention(x, memory, memory, need_weights=False)[0].pow(2).mean()


def test_of_ranks_that_attend_alike_the_one_with_the_largest_parts_is_shown() -> None:
    model, inputs = KeysAndValues(), (torch.ones(1, 16, 32), torch.ones(1, 32, 32))
    (option,) = sptransform.compare(model, inputs, world_size=4, strategies=["megatron"]).options
    steps = [step_of(sptransform.rewrite(model, "megatron", inputs, world_size=4, rank=rank)) for rank in range(4)]
    assert min(step.flops() for step in steps) < max(step.flops() for step in steps) == option.step.flops()


@pytest.mark.parametrize("world_size", [1, 0, True, "4", (2, 2)])
def test_ranks_are_a_number(world_size: object) -> None:
    with pytest.raises(UsageError, match="compare takes a number of ranks"):
        sptransform.compare(nn.Identity(), (torch.ones(1),), world_size=world_size)


WRONG = {
    "a class": ({"model": nn.Linear}, "takes an nn.Module"),
    "no arguments": ({"inputs": torch.ones(2)}, "inputs are the arguments of a call"),
    "one strategy": ({"strategy": "ring"}, "fix: strategies="),
    "a mesh": ({"mesh": 2}, "fix: world_size="),
    "none": ({"strategies": []}, "none of these strategies takes 2 ranks"),
    "pairs on a prime": ({"strategies": ["usp", ("ring", "megatron")]}, "none of these strategies takes 2 ranks"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_compared_is_refused(name: str) -> None:
    given, says = WRONG[name]
    with pytest.raises(UsageError, match=says):
        sptransform.compare(**{"model": nn.Linear(2, 2), "inputs": (torch.ones(2, 2),), "world_size": 2, **given})
