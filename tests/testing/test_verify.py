"""`verify`: what is right is equal, each mistake of users is found and placed, and nothing of theirs changes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import rich
import torch
from torch import Tensor, nn
from torch.nn import functional

import sptransform
from sptransform import CaptureError, UsageError, Verdict, verify
from sptransform.testing import trial
from tests.support.tiers import tiered
from tests.support.tiny import AttentionWithLoss, attention, attention_with_loss, token_inputs
from tests.testing.mistakes import WRONG_RULE, KeysStay, Larger, Running, TwiceTheGradient

pytestmark = pytest.mark.timeout(180)


class Whole(nn.Module):
    """Has all that is compared: outputs in a structure, an input with a gradient, buffers, one of them replaced."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48)
        self.norm = nn.BatchNorm1d(16)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, numbers: Tensor) -> dict[str, Any]:
        self.calls = self.calls + 1
        parts = [part.unflatten(-1, (4, 4)).transpose(1, 2) for part in self.project(x).chunk(3, -1)]
        attended = functional.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(2)
        normed = self.norm(self.dropout(attended).transpose(1, 2)).transpose(1, 2)
        return {"normed": normed, "numbers": (numbers, numbers + 1)}


def inputs_of_whole() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"x": torch.randn(2, 33, 16, requires_grad=True), "numbers": torch.arange(33)}


class Sensitive(nn.Module):
    """What it sums in float32 decides where on a wave it is, so that rounding shows."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = attention()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.attention(tokens).float()
        return (1e4 * x.mean(1)).sin().double().mean()


def simulated(model: Any, strategy: Any = "ulysses", inputs: Any = None, **options: Any) -> Verdict:
    given = token_inputs() if inputs is None else inputs
    return verify(model, strategy, given, **{"world_size": 2, "processes": False, **options})


def kinds(verdict: Verdict) -> dict[str, int]:
    found = [each.kind for each in verdict.compared]
    return {kind: found.count(kind) for kind in dict.fromkeys(found)}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, (2, 2)])
def test_what_auto_chooses_runs_on_simulated_ranks(world_size: Any) -> None:
    verdict = simulated(attention_with_loss(), "auto", world_size=world_size)
    assert verdict.ok and verdict.worst.error < 1e-12, str(verdict)
    assert verdict.reason.startswith("auto takes ") and f"A{verdict.reason[1:]}." in str(verdict)


@pytest.mark.slow
def test_auto_that_may_cut_parameters_gets_the_inputs() -> None:
    verdict = verify(attention_with_loss(), sptransform.Auto(megatron=True), token_inputs(), world_size=2, timeout=200)
    assert verdict.ok and verdict.worst.error < 1e-12, str(verdict)
    assert verdict.reason.startswith("auto takes "), "of the process of a rank"


# --- what is right ----------------------------------------------------------------------------------------------


def test_all_that_a_call_gives_is_compared() -> None:
    """On processes, which take what cannot be pickled; 2 ranks do not divide 33 rows."""
    model, inputs = Whole(), inputs_of_whole()
    model.project.register_forward_hook(lambda module, args, output: output)
    state, generator = {name: x.clone() for name, x in model.state_dict().items()}, torch.get_rng_state()
    verdict = verify(model, "ulysses", inputs, world_size=2, timeout=120)
    assert verdict.ok and verdict.worst.error < 1e-12, str(verdict)
    assert kinds(verdict) == {"loss": 1, "output": 3, "parameter": 4, "input": 1, "buffer": 4}
    assert {each.name for each in verdict.compared if each.kind == "output"} == {
        "output['normed']", "output['numbers'][0]", "output['numbers'][1]"
    }  # fmt: skip
    # what the user had is as it was
    assert model.training and torch.get_default_dtype() == torch.float32
    assert torch.equal(generator, torch.get_rng_state())
    assert all(x.grad is None for x in (*model.parameters(), *inputs.values()))
    assert all(torch.equal(x, state[name]) and x.dtype == state[name].dtype for name, x in model.state_dict().items())


def test_simulated_ranks_leave_the_caller_as_it_was() -> None:
    model, inputs = Whole(), inputs_of_whole()
    state, generator = {name: x.clone() for name, x in model.state_dict().items()}, torch.get_rng_state()
    with torch.no_grad():
        verdict = simulated(model, "ring", inputs)
        assert not torch.is_grad_enabled()
    assert verdict.ok and verdict.worst.error < 1e-12, str(verdict)
    # a buffer that is replaced is no input of the graph that is written
    assert kinds(verdict) == {"loss": 1, "output": 3, "parameter": 4, "input": 1, "buffer": 3}
    assert torch.equal(generator, torch.get_rng_state()) and torch.get_default_dtype() == torch.float32
    assert all(x.grad is None for x in (*model.parameters(), *inputs.values()))
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gradients of which ranks have terms": ("ring", {"grad_sync": False}),
    "two mesh dims": (("ring", "megatron"), {"world_size": (2, 2)}),
    "a loss of ours": ("megatron", {"loss": lambda outputs: outputs["normed"].square().mean()}),
    "whole outputs": ("usp", {"outputs": "full", "world_size": 4}),
}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, processes: bool) -> None:
    strategy, options = OPTIONS[name]
    given = {"world_size": 2, "processes": processes, **options}
    verdict = verify(lambda: Whole(), strategy, inputs_of_whole(), **given)
    assert verdict.ok and verdict.worst.error < 1e-11, str(verdict)


@pytest.mark.slow
def test_parameters_in_parts() -> None:
    verdict = verify(Whole(), "ulysses", inputs_of_whole(), world_size=2, shard_parameters=True)
    assert verdict.ok and verdict.worst.error < 1e-12, str(verdict)


@pytest.mark.slow
def test_outputs_that_are_not_returned_are_not_compared() -> None:
    for processes in (False, True):
        verdict = verify(
            attention_with_loss(), "ring", token_inputs(), world_size=2, processes=processes, outputs="loss"
        )
        assert verdict.ok and kinds(verdict) == {"loss": 1, "parameter": 5}


@pytest.mark.slow
def test_with_dropout_it_is_compared_in_evaluation() -> None:
    verdict = simulated(Whole(dropout=0.1), "ulysses", inputs_of_whole())
    assert verdict.ok and verdict.mode == "evaluation" and "dropout" in verdict.notes[0]


class Noise(AttentionWithLoss):
    def between(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


def test_what_is_random_in_evaluation_too_is_refused() -> None:
    with pytest.raises(UsageError, match="draws random numbers"):
        simulated(Noise())


# --- what is rounding -------------------------------------------------------------------------------------------


def test_rounding_of_float32_is_told_from_a_mistake() -> None:
    verdict = simulated(Sensitive(), inputs={"tokens": token_inputs()["tokens"]})
    assert verdict.ok and verdict.bound == 1e-9 and verdict.worst.error < 1e-9, str(verdict)
    assert "float32 at" in verdict.why and "x = self.attention(tokens).float()" in verdict.why
    wrong = simulated(Sensitive(), inputs={"tokens": token_inputs()["tokens"]}, passes=[Larger()])
    assert not wrong.ok and wrong.first.startswith("in attention.qkv, at"), str(wrong)


@pytest.mark.slow
def test_a_bound_of_the_users() -> None:
    verdict = simulated(Sensitive(), inputs={"tokens": token_inputs()["tokens"]}, rtol=1e-9)
    assert not verdict.ok and verdict.why == "rtol"


class Float32Only(AttentionWithLoss):
    def between(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("a kernel for float32")
        return x.sin()


@pytest.mark.slow
def test_a_model_that_does_not_run_in_float64() -> None:
    torch.manual_seed(0)
    model = Float32Only()
    verdict = simulated(model)
    assert verdict.ok and verdict.dtype == "float32" and 1e-8 < verdict.bound < 1e-5, str(verdict)
    assert "a kernel for float32" in verdict.why
    assert not simulated(model, passes=[Larger()]).ok


# --- mistakes ---------------------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "a rule": (Running, "ulysses", {"rules": WRONG_RULE}, "return running_mean(x, self.scale)"),
    "a pass": (attention_with_loss, "ring", {"passes": [Larger()]}, "in qkv, at"),
    "a pass, backward": (attention_with_loss, "ring", {"passes": [TwiceTheGradient()]}, "gradient of qkv.bias first"),
    "a strategy": (attention_with_loss, KeysStay(), {}, "scaled_dot_product_attention(query, key, value"),
}


@pytest.mark.parametrize("name", tiered(MISTAKES, quick=["a rule", "a pass, backward"]))
def test_a_mistake_is_found_and_placed(name: str) -> None:
    make, strategy, options, place = MISTAKES[name]
    verdict = simulated(make(), strategy, **options)
    assert not verdict.ok and verdict.differing
    assert place in verdict.first, str(verdict)
    assert verdict.worst_parameter.error > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_on_processes(name: str) -> None:
    make, strategy, options, place = MISTAKES[name]
    verdict = verify(make(), strategy, token_inputs(), world_size=2, **options)
    assert not verdict.ok and place in verdict.first, str(verdict)


@pytest.mark.slow
def test_what_torch_captured_otherwise_is_named() -> None:
    class Compiled(AttentionWithLoss):
        def between(self, x: Tensor) -> Tensor:
            return x * 2 if torch.compiler.is_compiling() else x

    verdict = simulated(Compiled())
    assert not verdict.ok and verdict.first.startswith("before anything is rewritten")


@pytest.mark.slow
def test_what_simulated_ranks_do_not_show_is_placed_outside_of_the_graph() -> None:
    def off(gm: Any, inputs: Any) -> Any:
        return lambda *args: tuple(x * 1.1 for x in gm(*args))

    torch._dynamo.register_backend(off, name="sptests_off")
    tokens = token_inputs()["tokens"]
    for model, inputs in ((attention_with_loss(), token_inputs()), (Sensitive(), {"tokens": tokens})):
        verdict = verify(model, "ulysses", inputs, world_size=2, backend="sptests_off")
        assert not verdict.ok and verdict.first.startswith("not on simulated ranks"), str(verdict)


@pytest.mark.slow
def test_a_buffer_of_another_rank_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what ranks leave behind, not of what they return."""
    step = trial.step

    def moved(model: nn.Module, *args: Any, **kwargs: Any) -> trial.Step:
        found = step(model, *args, **kwargs)
        found.result.buffers["norm.running_mean"] = found.result.buffers["norm.running_mean"] + 1e-6
        return found

    monkeypatch.setattr(trial, "step", moved)
    verdict = simulated(Whole(), "ulysses", inputs_of_whole())
    assert [each.name for each in verdict.differing] == ["norm.running_mean"]


# --- what is refused --------------------------------------------------------------------------------------------


class Decides(AttentionWithLoss):
    def between(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


def test_a_refusal_of_the_ranks_is_raised() -> None:
    with pytest.raises(CaptureError, match="decides by what a tensor holds"):
        verify(Decides(), "ulysses", token_inputs(), world_size=2, timeout=120)


def test_what_the_model_raises_is_raised() -> None:
    with pytest.raises(IndexError):
        simulated(attention(), inputs={"tokens": torch.tensor([[1000]])})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model": 3}, "takes an nn.Module"),
    "a class": ({"model": Whole}, "takes an nn.Module"),
    "makes none": ({"model": lambda: 3}, "returns something else"),
    "inputs": ({"inputs": [1]}, "inputs are the arguments of a call"),
    "loss": ({"loss": 1}, "loss is a function of what the model returns"),
    "no scalar": ({"loss": lambda outputs: outputs[None]}, "the loss is no scalar"),
    "one rank": ({"world_size": 1}, "several ranks with one device"),
    "timeout": ({"timeout": 0}, "timeout is a positive number"),
    "rtol": ({"rtol": -1}, "rtol is a positive number"),
    "mesh": ({"mesh": 1}, "makes the mesh itself"),
    "parts": ({"outputs": "local"}, "parts of outputs are not compared"),
    "backend": ({"backend": "eager"}, "simulated ranks have no backend"),
    "option": ({"stategy": 1}, "unknown option"),
    "meta": ({"model": attention_with_loss().to("meta")}, "no weights yet"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compared_is_refused(name: str) -> None:
    given, message = REFUSED[name]
    with pytest.raises(UsageError, match=message):
        verify(**{"model": attention_with_loss(), "strategy": "ulysses", "inputs": token_inputs(), "world_size": 2,
                  "processes": False, **given})  # fmt: skip


def test_a_model_that_returns_nothing_to_compare() -> None:
    class Nothing(AttentionWithLoss):
        def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
            return tokens

    with pytest.raises(UsageError, match="no floating-point tensor"):
        simulated(Nothing())


def test_a_loss_that_is_no_number_is_refused() -> None:
    """On ranks it would be no number either, whatever they compute."""
    with pytest.raises(UsageError, match=r"the loss on one device is no finite number.*\n  found: nan"):
        simulated(attention_with_loss(), loss=lambda outputs: outputs * float("nan"))


# --- how it is shown --------------------------------------------------------------------------------------------


def shown(ok: bool, *compared: sptransform.Compared) -> Verdict:
    first = None if ok else "in qkv, at model.py:3: self.qkv(x)"
    rest = ("float64", "training", "a loss", ("Note.",))
    return Verdict(ok, "Ring()", (2, 2), True, 1e-9, "rtol", compared, first, *rest)


def test_it_is_shown_as_text_in_colour_and_as_data(capsys: pytest.CaptureFixture[str]) -> None:
    loss = sptransform.Compared("loss", "loss", 1e-12, 1)
    grad = sptransform.Compared("parameter", "w", float("inf"), 0)
    right, wrong = shown(True, loss), shown(False, loss, grad)
    assert str(right).startswith("Equal to one device: Ring() on 2 x 2 processes\n  Largest difference: the loss, ")
    assert "Allowed: 1e-09 of a tensor's largest value: rtol." in str(right) and "Note." in str(right)
    assert str(wrong).startswith("Differs from one device") and "What differs: 1 of 2 tensors" in str(wrong)
    rich.print(wrong)
    assert "First difference: in qkv" in capsys.readouterr().out
    assert json.loads(json.dumps(wrong.to_dict())) == wrong.to_dict()
    assert wrong.to_dict()["compared"][1] == {"kind": "parameter", "name": "w", "error": None, "rank": 0}
    assert wrong.differing == (grad,) and wrong.worst_parameter == wrong.worst == grad
    assert right.worst_parameter is None
