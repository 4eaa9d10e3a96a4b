"""The examples of what users add run as the pages say."""

from __future__ import annotations

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
