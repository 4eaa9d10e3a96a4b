"""A call beside this process gives what a plain call gives, whatever becomes of the fork."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sptransform.planning import beside
from sptransform.planning.beside import Beside

pytestmark = pytest.mark.timeout(60)
HERE = os.getpid()


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(beside, "_has_two_cores", lambda: True)
    monkeypatch.setattr(beside, "can_fork", lambda: True)
    before = {*multiprocessing.active_children()}  # such as ranks that tests share
    yield
    assert {*multiprocessing.active_children()} <= before


def test_a_fork_computes_one_call_and_this_process_the_next() -> None:
    may_end = multiprocessing.get_context("fork").Event()
    with Beside() as calls:
        first = calls.call(lambda: os.getpid() if may_end.wait(50) else None)
        assert calls.call(os.getpid)() == HERE
        may_end.set()
        assert first() == first() not in (HERE, None)
        assert calls.call(os.getpid)() not in (HERE, first())


def test_a_result_larger_than_a_pipe_holds_does_not_keep_the_fork() -> None:
    with Beside() as calls:
        found = [calls.call(lambda n=n: bytes(n)) for n in (1 << 20, 1, 1 << 20, 1)]
        assert [len(each()) for each in found] == [1 << 20, 1, 1 << 20, 1]


@pytest.mark.parametrize("elsewhere", ["dies", "hangs", "raises", "cannot answer"])
def test_what_a_fork_does_not_answer_is_computed_here(elsewhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "TIMEOUT", 0.5)

    def compute() -> object:
        if os.getpid() == HERE:
            return HERE
        if elsewhere == "raises":
            raise RuntimeError("in the fork")
        if elsewhere == "cannot answer":
            return lambda: None  # cannot be pickled
        if elsewhere == "dies":
            os._exit(0)
        return time.sleep(60)

    with Beside() as calls:
        assert calls.call(compute)() == HERE
        assert calls.call(os.getpid)() == HERE  # no further fork


def test_an_error_is_that_of_the_call() -> None:
    def fail() -> None:
        raise ValueError("of the call")

    with Beside() as calls, pytest.raises(ValueError, match="of the call"):
        calls.call(fail)()


def test_a_call_that_nobody_asks_for_ends() -> None:
    with Beside() as calls:
        calls.call(lambda: time.sleep(60))


def test_one_core_computes_all_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "_has_two_cores", lambda: False)
    with Beside() as calls:
        assert calls.call(os.getpid)() == HERE


@pytest.mark.parametrize("fails", ["pipe", "fork"])
def test_a_fork_that_cannot_be_started_is_not(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no more of these")

    with Beside() as calls:
        monkeypatch.setattr(*{"pipe": (multiprocessing, "Pipe"), "fork": (os, "fork")}[fails], refuse)
        assert calls.call(os.getpid)() == HERE
        monkeypatch.undo()
        assert calls.call(os.getpid)() == HERE  # nor tried again


def test_where_a_process_cannot_be_started_to_try_it_nothing_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> bool:
        raise OSError("no more of these")

    monkeypatch.setattr(beside, "can_fork", refuse)
    with Beside() as calls:
        assert calls.call(os.getpid)() == HERE


def test_a_fork_ends_when_who_asked_was_killed() -> None:
    """Also one with more to write than a pipe holds."""
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def ask() -> None:
        Beside().call(lambda: theirs.send(os.getpid()) or bytes(1 << 20))
        time.sleep(60)

    asking = multiprocessing.get_context("fork").Process(target=ask)
    asking.start()
    forked = ours.recv()
    asking.kill()
    asking.join()
    until = time.monotonic() + 20
    while (is_there := _runs(forked)) and time.monotonic() < until:
        time.sleep(0.05)
    if is_there:
        os.kill(forked, signal.SIGKILL)
    assert not is_there


def _runs(pid: int) -> bool:
    """Whether a process computes or waits: one that ended may stay until its parent asks for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
