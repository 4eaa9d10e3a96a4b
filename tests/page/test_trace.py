"""The trace as Perfetto reads it: processes, tracks, counters, and arrows that lead from hops to waits."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import sptransform
from sptransform import UsageError
from tests.page.shown import comparison, stack

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("trace") / "step.json"
    comparison().trace(path, "ring")
    return json.loads(path.read_text())["traceEvents"]


def test_a_process_is_a_rank_with_two_tracks(entries: list[dict[str, Any]]) -> None:
    names = [(e["pid"], e["args"]["name"]) for e in entries if e["name"] == "process_name"]
    assert names == [(rank, f"rank {rank}") for rank in range(4)]
    tracks = Counter(e["args"]["name"] for e in entries if e["name"] == "thread_name")
    assert tracks == {"compute": 4, "communication": 4}


def test_slices_of_a_track_do_not_overlap(entries: list[dict[str, Any]]) -> None:
    for thread in (0, 1):
        own = sorted((e["ts"], e["dur"]) for e in entries if e["ph"] == "X" and (e["pid"], e["tid"]) == (0, thread))
        assert own
        for (start, length), (following, _) in itertools.pairwise(own):
            assert start + length <= following + 2e-3, "rounded to a nanosecond each"


def test_the_step_is_as_long_as_its_timeline(entries: list[dict[str, Any]]) -> None:
    (option,) = [each for each in comparison().options if each.name == "ring"]
    end = max(e["ts"] + e["dur"] for e in entries if e["ph"] == "X")
    assert end == pytest.approx(option.timeline.seconds * 1e6, abs=0.01)
    shown = sum(
        e["args"].get("bytes sent", 0) for e in entries if e["ph"] == "X" and e["pid"] == 0 and e["cat"] == "message"
    )
    assert shown == option.step.bytes_sent()


def test_live_bytes_peak_as_the_step_does(entries: list[dict[str, Any]]) -> None:
    (option,) = [each for each in comparison().options if each.name == "ring"]
    assert max(e["args"]["bytes"] for e in entries if e["ph"] == "C") == option.timeline.peak_bytes


def test_arrows_go_round_the_ring(entries: list[dict[str, Any]]) -> None:
    starts = {e["id"]: e for e in entries if e["ph"] == "s"}
    ends = {e["id"]: e for e in entries if e["ph"] == "f"}
    assert starts.keys() == ends.keys() and starts
    hops = [e for e in entries if e["ph"] == "X" and e["cat"] == "message" and e["name"] == "send_recv"]
    assert len(starts) == len(hops)
    for number, start in starts.items():
        assert ends[number]["pid"] == (start["pid"] + 1) % 4
        assert ends[number]["ts"] >= start["ts"]


def test_wrong_ranks_and_strategies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a trace is of ranks that there are"):
        comparison().trace(tmp_path / "x.json", ranks=[4])
    with pytest.raises(UsageError, match="a trace is of a strategy that was simulated"):
        comparison().trace(tmp_path / "x.json", "usp")
    model, inputs = stack(1)
    with pytest.raises(UsageError, match="a trace has times, which hardware gives"):
        sptransform.explain(model, "ring", inputs, world_size=2).trace(tmp_path / "x.json")


def test_of_many_ranks_some_are_drawn(tmp_path: Path) -> None:
    comparison().trace(tmp_path / "x.json", ranks=[1, 2])
    entries = json.loads((tmp_path / "x.json").read_text())["traceEvents"]
    assert {e["pid"] for e in entries} == {1, 2}
