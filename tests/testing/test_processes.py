"""Local processes that come to nothing: ranks are named, and no process stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import sptransform
from sptransform.testing import processes
from sptransform.testing.processes import WorkerDied, WorkerError, WorkerTimeout, on_processes

pytestmark = pytest.mark.timeout(120)


def summed(rank: int, world_size: int, offset: float) -> float:
    total = torch.tensor(rank + offset)
    dist.all_reduce(total)
    return total.item()


def own_pid(rank: int, world_size: int) -> int:
    return os.getpid()


def is_running(pid: int) -> bool:
    """Whether a process computes or waits; one that ended and was not asked for its exit code does neither."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_a_function_that_cannot_be_pickled_runs_in_a_fork() -> None:
    (torch.ones(400, 400) @ torch.ones(400, 400)).sum()  # threads that a fork has not
    assert on_processes(2, lambda rank, world_size: summed(rank, world_size, 1.0), timeout=60) == [3.0, 3.0]


def test_a_rank_that_does_not_answer_is_named_and_ended(tmp_path: Path) -> None:
    def stuck(rank: int, world_size: int) -> None:
        (tmp_path / str(rank)).write_text(str(os.getpid()))
        if rank == 1:
            time.sleep(600)

    with pytest.raises(WorkerTimeout, match=r"within 1 s from ranks \[1\] of 2") as caught:
        on_processes(2, stuck, timeout=1)
    assert "in stuck" in str(caught.value)
    assert not any(is_running(int(file.read_text())) for file in tmp_path.iterdir())


def test_what_a_rank_raises_comes_back() -> None:
    def fail(rank: int, world_size: int) -> None:
        raise sptransform.UsageError("no such thing")

    with pytest.raises(WorkerError) as caught:
        on_processes(1, fail, timeout=60)
    assert isinstance(caught.value.errors[0], sptransform.UsageError)


def test_an_error_that_cannot_be_pickled_comes_back_as_text() -> None:
    def fail(rank: int, world_size: int) -> None:
        raise type("Mine", (Exception,), {})("not to be found")

    with pytest.raises(WorkerError, match="not to be found") as caught:
        on_processes(1, fail, timeout=60)
    assert caught.value.errors == {0: None}


def test_a_rank_that_ends_is_named() -> None:
    with pytest.raises(WorkerDied, match=r"rank 0 \(exit code 3\)"):
        on_processes(1, lambda rank, world_size: os._exit(3), timeout=60)


@pytest.mark.slow
def test_processes_are_spawned_where_a_fork_could_not_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_compute", lambda: os._exit(1))
    assert on_processes(2, summed, 1.0, timeout=60) == [3.0, 3.0]
    with pytest.raises(sptransform.UsageError, match="cannot be sent to a new process"):
        on_processes(2, lambda rank, world_size: None, timeout=60)


SCRIPT = """
import os, sys, time
from sptransform.testing.processes import on_processes

def wait(rank, world_size):
    print(os.getpid(), file=open(sys.argv[1] + f"/{rank}", "w"), flush=True)
    time.sleep(600)

on_processes(2, wait, timeout=600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_processes_end_with_the_one_that_started_them(how: int, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    pids = tmp_path / "pids"
    pids.mkdir()
    root = Path(sptransform.__file__).parents[1]
    started = subprocess.Popen(
        [sys.executable, script, pids], env={**os.environ, "PYTHONPATH": str(root)}, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (len(files := [*pids.iterdir()]) == 2 and all(file.read_text() for file in files)):
        assert time.monotonic() < deadline and started.poll() is None
        time.sleep(0.1)
    started.send_signal(how)
    _, errors = started.communicate(timeout=60)
    assert ("KeyboardInterrupt" in errors) == (how == signal.SIGINT)
    while any(is_running(int(file.read_text())) for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.1)
