"""What a compile says of itself: log lines by TORCH_LOGS, graphs by TORCH_TRACE. Each is read from a process."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sptransform
from tests.support.tiny import attention_with_loss, token_inputs
sptransform.rewrite(attention_with_loss(), "ulysses", token_inputs(), world_size=2)
"""


def run(**variables: str) -> str:
    """What the program writes to stderr under these environment variables."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=os.environ | variables,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@dataclass(frozen=True)
class Debugged:
    """What a run with everything on wrote: log lines, and the structured trace."""

    log: str
    trace: str


@pytest.fixture(scope="module")
def debugged(tmp_path_factory: pytest.TempPathFactory) -> Debugged:
    folder = tmp_path_factory.mktemp("trace")
    log = run(TORCH_LOGS="+sptransform", TORCH_TRACE=str(folder))
    (trace,) = folder.iterdir()
    return Debugged(log, trace.read_text())


def test_one_line_a_compile(debugged: Debugged) -> None:
    (line,) = [line for line in debugged.log.splitlines() if " collectives forward" in line]
    assert "Ulysses(split='heads') on 2 ranks: 3 collectives forward, 3 backward, 0 fallbacks in " in line


def test_graphs_after_every_pass_at_debug(debugged: Debugged) -> None:
    for name in ("AssignPlacements", "InsertRedistributes", "Localize"):
        assert f"after {name}:" in debugged.log


@pytest.mark.slow
def test_info_has_no_graphs() -> None:
    shown = run(TORCH_LOGS="sptransform")
    assert " collectives forward" in shown
    assert "after AssignPlacements:" not in shown


@pytest.mark.slow
def test_silent_without_torch_logs() -> None:
    assert " collectives forward" not in run()


def test_graphs_are_artifacts_of_the_structured_trace(debugged: Debugged) -> None:
    graphs = artifacts(debugged.trace)
    assert graphs.keys() == {"sptransform_before", "sptransform_after", "sptransform_summary"}
    assert "aten.scaled_dot_product_attention" in graphs["sptransform_before"]
    assert "@sp" not in graphs["sptransform_before"]
    assert "sptransform.all_to_all(" in graphs["sptransform_after"]
    assert "return (" in graphs["sptransform_after"]


def test_what_is_sent_is_an_artifact_of_the_structured_trace(debugged: Debugged) -> None:
    first, *lines = artifacts(debugged.trace)["sptransform_summary"].splitlines()
    assert first.endswith("3 collectives forward, 3 backward, 0 fallbacks")
    assert sum(int(line.split(": ")[1].split(" ")[0]) for line in lines) == 6
    assert any(" forward all_to_all: 2 messages, " in line for line in lines), lines


def artifacts(trace: str) -> dict[str, str]:
    """Our artifacts in a trace: an entry is a line of JSON after a glog prefix, its payload the lines behind a tab."""
    found: dict[str, str] = {}
    name = None
    for line in trace.splitlines():
        if not line.startswith("\t"):
            entry = json.loads(line[line.index("] {") + 2 :])
            name = entry.get("artifact", {}).get("name", "")
            name = name if name.startswith("sptransform") else None
        elif name is not None:
            found[name] = found.get(name, "") + line.removeprefix("\t") + "\n"
    return found
