"""The command: what it prints and writes, what it returns, and errors that say the fix."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sptransform.cli import commands
from sptransform.cli.doctor import Line, Verdict, checked, told_by
from sptransform.cli.main import main, parser
from sptransform.cli.models import Asked, model_and_inputs

BUILD = "tests.cli.factories:build"
SIZES = ("--world-size", "2", "--seq-len", "32")
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    | {"intermediate_size": 32, "vocab_size": 64},
    "t5": {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4, "vocab_size": 64},
    "vit": {"model_type": "vit", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    | {"num_attention_heads": 4, "image_size": 32, "patch_size": 8},
}


def config(name: str, folder: Path, **more: Any) -> str:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(CONFIGS[name] | more))
    return str(path)


def test_strategies_and_ranks_are_read() -> None:
    options = parser().parse_args(
        ["explain", BUILD, "--strategy", "ring+megatron,usp", "--world-size", "2x4", "--seq-len", "8"]
    )
    assert options.strategy == [("ring", "megatron"), "usp"] and options.world_size == (2, 4)


def test_explain_writes_all_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, trace = tmp_path / "out.html", tmp_path / "step.json"
    written = ("--html", str(page), "--trace", str(trace), "--hardware", "h100-nvlink")
    assert main(["explain", BUILD, "--strategy", "ulysses,allgather", *SIZES, *written, "--json"]) == 0
    shown = capsys.readouterr()
    ulysses, gathering = json.loads(shown.out)
    assert ulysses["strategy"].startswith("Ulysses") and gathering["strategy"].startswith("AllGatherKV")
    assert 0 < ulysses["exposed_seconds"] < ulysses["seconds"]
    assert shown.err == ""  # progress is for terminals
    assert "<svg" in page.read_text()
    for name in ("ulysses", "allgather"):
        assert json.loads((tmp_path / f"step.{name}.json").read_text())["traceEvents"]


def test_models_are_made_without_memory(tmp_path: Path) -> None:
    model, inputs = model_and_inputs(Asked(config("llama", tmp_path), seq_len=1 << 20, batch=2))
    assert type(model).__name__ == "LlamaForCausalLM" and not model.config.use_cache
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {name: (tuple(x.shape), x.is_meta) for name, x in inputs.items()} == {
        "input_ids": ((2, 1 << 20), True),
        "labels": ((2, 1 << 20), True),
    }
    model, (x,) = model_and_inputs(Asked(BUILD, seq_len=8, dtype=torch.float16))
    assert x.is_meta and x.shape == (1, 8, 16) and x.dtype == model.qkv.weight.dtype == torch.float16


def test_a_factory_may_know_its_length() -> None:
    """As of images, whose number of patches no argument says."""
    options = parser().parse_args(["compare", "tests.cli.factories:of_images", "--world-size", "2", "--batch", "2"])
    _, (x,) = model_and_inputs(Asked(options.model, options.seq_len, options.batch))
    assert x.shape == (2, 9, 16) and x.is_meta


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "shapes"),
    [
        ("t5", "T5ForConditionalGeneration", {"input_ids": (1, 24), "labels": (1, 24), "decoder_input_ids": (1, 24)}),
        ("vit", "ViTForImageClassification", {"pixel_values": (1, 3, 32, 32), "labels": (1,)}),
    ],
)
def test_inputs_of_other_kinds_are_found(
    name: str, kind: str, shapes: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    model, inputs = model_and_inputs(Asked(config(name, tmp_path), seq_len=24))
    assert type(model).__name__ == kind
    assert {name: tuple(x.shape) for name, x in inputs.items()} == shapes
    with torch.no_grad():
        assert model(**inputs).loss.shape == ()


ERRORS = {
    "no length": (["compare", BUILD, "--world-size", "2"], "how long are the sequences of"),
    "no colon": (
        ["explain", "tests.cli.factories", "--strategy", "ring", *SIZES],
        "a model is given as MODULE:FACTORY",
    ),
    "no module": (["explain", "tests.cli.none:x", "--strategy", "ring", *SIZES], "tests.cli.none cannot be imported"),
    "no function": (["explain", "tests.cli.factories:none", "--strategy", "ring", *SIZES], "has no none"),
    "a number": (["explain", "tests.cli.factories:no_function", "--strategy", "ring", *SIZES], "is no function"),
    "no model": (["explain", "tests.cli.factories:number", "--strategy", "ring", *SIZES], "made no model"),
    "it fails": (["explain", "tests.cli.factories:fails", "--strategy", "ring", *SIZES], "the weights are elsewhere"),
    "no file": (["compare", "none.json", *SIZES], "none.json cannot be read"),
    "no strategy": (["compare", BUILD, "--strategy", "rung", *SIZES], "unknown strategy"),
    "no hardware": (["compare", BUILD, *SIZES, "--hardware", "h1000"], "there is no hardware 'h1000'"),
    "a mesh": (["compare", BUILD, "--world-size", "2x2", "--seq-len", "32"], "compare makes the meshes itself"),
    "no times": (["explain", BUILD, "--strategy", "ring", *SIZES, "--trace", "x.json"], "a trace has times"),
    "no module's name": (["explain", ":build", "--strategy", "ring", *SIZES], "a model is given as MODULE:FACTORY"),
    "a relative module": (["explain", ".x:build", "--strategy", "ring", *SIZES], "a model is given as MODULE:FACTORY"),
    "a class of C": (["explain", "torch:Tensor", "--strategy", "ring", *SIZES], "is no function"),
    "it exits": (["explain", "tests.cli.factories:exits", "--strategy", "ring", *SIZES], "SystemExit: 3"),
    "other inputs": (["explain", "tests.cli.factories:misfit", "--strategy", "ring", *SIZES], "does not take"),
    "wrong inputs": (
        ["verify", "tests.cli.factories:too_wide", "--strategy", "ring", "--simulated"],
        "a step of tests.cli.factories:too_wide fails",
    ),
    "inputs of another shape": (
        ["explain", "tests.cli.factories:too_wide", "--strategy", "ring", *SIZES],
        "fails on tensors of the shapes",
    ),
    "small": (["verify", BUILD, "--small", "--strategy", "ring"], "only a configuration can be made small"),
    "no folder of the page": (["compare", BUILD, *SIZES, "--html", "none/out.html"], "no folder none"),
    "no folder of the trace": (
        ["explain", BUILD, "--strategy", "ring", *SIZES, "--hardware", "h200", "--trace", "none/out.json"],
        "no folder none",
    ),
    "a page that is a folder": (["compare", BUILD, *SIZES, "--html", "."], "it is a folder"),
    "no folder of the file": (["calibrate", "--out", "none/here.json"], "no folder none"),
    "no times to compare": (["compare", BUILD, *SIZES, "--trace", "x.json"], "a trace has times"),
    "one rank": (["calibrate", "--ranks", "1"], "messages are measured between ranks"),
}


@pytest.mark.parametrize("given", ERRORS.values(), ids=ERRORS)
def test_errors_say_the_fix(given: tuple[list[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    asked, message = given
    assert main(asked) == 2
    shown = capsys.readouterr()
    assert message in shown.err and "\n  fix: " in shown.err and "Traceback" not in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("source", "message"), [("raise RuntimeError('no weights')", "RuntimeError: no weights"), ("x = (", "SyntaxError")]
)
def test_a_module_that_fails(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "failing_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["explain", "failing_module:build", "--strategy", "ring", *SIZES]) == 2
    shown = capsys.readouterr().err
    assert "failing_module cannot be imported" in shown and message in shown and "failing_module.py" in shown


@pytest.mark.parametrize("more", [{"hidden_size": "wide"}, {"hidden_size": 33}, {"model_type": ["llama"]}])
def test_a_configuration_of_no_use(more: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", config("llama", tmp_path, **more), *SIZES]) == 2
    assert "is no configuration" in capsys.readouterr().err


def test_what_a_model_prints_is_no_part_of_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "tests.cli.factories:prints", "--strategy", "ring", *SIZES, "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) and shown.err == "noise\n"


def test_a_reader_that_has_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["explain", BUILD, "--strategy", "ring", *SIZES, "--json"]) == 0


def test_an_unknown_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", config("llama", tmp_path, model_type="none"), *SIZES]) == 2
    assert "no configuration that transformers knows" in capsys.readouterr().err


def test_the_doctor_fails_on_problems(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fine, wrong = Line("torch", Verdict.OK, "2.13"), Line("gloo", Verdict.PROBLEM, "not there", "another torch")
    for found, code in (([fine], 0), ([fine, wrong], 1)):
        monkeypatch.setattr(commands, "checked", lambda found=found: found)
        assert main(["doctor"]) == code
    assert "1 problem, 0 notes, 1 ok" in capsys.readouterr().out
    main(["doctor", "--json"])
    assert json.loads(capsys.readouterr().out)[1] == {
        "about": "gloo", "verdict": "problem", "found": "not there", "fix": "another torch",
    }  # fmt: skip


def test_the_doctor_knows_this_installation() -> None:
    found = {line.about: line for line in checked()}
    assert found["private names of torch"].verdict is Verdict.OK
    assert found["back end gloo"].verdict is Verdict.OK
    assert torch.__version__ in found["torch"].found
    assert all(line.fix for line in found.values() if line.verdict is Verdict.PROBLEM)


def test_variables_that_turn_the_compiler_off_are_problems() -> None:
    (off, other) = told_by({"TORCH_COMPILE_DISABLE": "1", "NCCL_P2P_DISABLE": "0", "NCCL_ALGO": "Ring", "HOME": "/"})
    assert off.verdict is Verdict.PROBLEM and off.about == "TORCH_COMPILE_DISABLE"
    assert other.verdict is Verdict.NOTE and other.found == "NCCL_ALGO=Ring"


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [config("llama", tmp_path), "--small", "--strategy", "ulysses", "--seq-len", "16"]
    assert main(["verify", *given, "--simulated", "--json"]) == 0
    assert [verdict["ok"] for verdict in json.loads(capsys.readouterr().out)] == [True]
    assert main(["verify", BUILD, "--strategy", "ring", "--seq-len", "16"]) == 0
    assert "Equal to one device" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_compare(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", BUILD, *SIZES, "--hardware", "h100-nvlink", "--json"]) == 0
    names = {option["name"] for option in json.loads(capsys.readouterr().out)["options"]}
    assert {"ulysses", "ring", "allgather", "megatron"} <= names
