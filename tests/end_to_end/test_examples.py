"""The examples of what users add run as the README says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own_pass.py", ["without the pass False, with it True", "> ForgetGathers:", "is not placed as its consumer"]),
        ("own_rule.py", ["without the rule: 1 fallback", "with it: 0 fallbacks", "ok: losses differ"]),
    ],
)
def test_an_example(name: str, said: list[str]) -> None:
    run = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    for text in said:
        assert text in run.stdout, run.stdout
