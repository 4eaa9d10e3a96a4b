"""The examples of what users add run as the pages say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import sptransform
from sptransform.compiler.options import Options
from tests.support.own_ops import made_for_the_page

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own_pass.py", ["without the pass False, with it True", "> ForgetGathers:", "is not placed as its consumer"]),
        pytest.param(
            "own_rule.py",
            ["without the rule: 1 fallback", "with it: 0 fallbacks", "ok: losses differ"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_example(name: str, said: list[str]) -> None:
    run = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    for text in said:
        assert text in run.stdout, run.stdout


def torchrun(name: str, ranks: int, *arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    run = subprocess.run(
        [*command, EXAMPLES / name, "--tiny", *arguments],
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout + run.stderr


def losses(said: str) -> list[float]:
    """Those that Trainer logs, or the last one of a progress bar."""
    return [float(found) for found in re.findall(r"(?<![a-z_])loss'?:? '?([0-9.]+)", said)]


@pytest.mark.slow
@pytest.mark.timeout(560)
@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("train_custom_model.py", 1e-4), ("train_fsdp2.py", 2e-2)],  # the second in bfloat16
)
def test_an_example_trains_as_one_process(name: str, tolerance: float) -> None:
    alone, found = torchrun(name, 1), torchrun(name, 2)
    assert "tokens/s" in found and "peak" in found
    assert losses(found) == pytest.approx(losses(alone), rel=tolerance)


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize(("name", "needs"), [("train_hf_trainer.py", "accelerate"), ("lora_sft.py", "trl")])
def test_an_example_of_a_trainer(name: str, needs: str) -> None:
    """That it trains as one process does is tested in `tests/integrations/test_trainer.py`."""
    pytest.importorskip(needs)
    found = torchrun(name, 2)
    assert len(losses(found)) > 2 and "tokens_per_second" in found and "peak_memory_mib" in found


@pytest.mark.slow
@pytest.mark.timeout(560)
def test_a_run_goes_on_from_a_checkpoint_on_fewer_ranks(tmp_path: Path) -> None:
    arguments = "--dp", "2", "--checkpoint", str(tmp_path)
    whole = torchrun("train_fsdp2.py", 4, "--dp", "2")
    torchrun("train_fsdp2.py", 4, "--steps", "2", *arguments)
    assert losses(torchrun("train_fsdp2.py", 2, *arguments)) == pytest.approx(losses(whole), rel=2e-2)


@pytest.mark.slow
@pytest.mark.timeout(560)
def test_a_video_is_that_of_one_process() -> None:
    pytest.importorskip("diffusers")
    said = [re.findall(r"deviation ([0-9.]+)", torchrun("video_transformer.py", ranks)) for ranks in (1, 2)]
    assert said[0] == said[1] != []


def test_the_page_on_extending_runs() -> None:
    """Its blocks one after the other; of `parallelize`, what needs no processes: the request is checked."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
    made_for_the_page()
    requests: list[Options] = []

    def parallelize(model: Any, strategy: Any, **options: Any) -> Any:
        requests.append(Options(strategy=strategy, **options))
        return model

    with mock.patch.object(sptransform, "parallelize", parallelize):
        found: dict[str, Any] = {"torch": torch, "model": None}
        for block in blocks:
            exec(block, found)
    assert found["factors"] == (".2", ".1")
    assert [len(request.rules) for request in requests] == [1, 0, 0]
    x = torch.randn(24, 5, dtype=torch.float64)
    op = torch.ops.mylib.unflattened.default
    assert sptransform.testing.check_rule(op, found["rules"][op], (x, 4, 6)) == ("b", "s", "h")
