"""Local processes of one gloo group, each of which runs a function: started, waited for, and ended whatever happens.

    results = on_processes(2, function, *args, timeout=60.0)    # function(rank, 2, *args) on both

What ends otherwise names its ranks: an exception is a :class:`WorkerError`, a process that is gone a
:class:`WorkerDied`, silence a :class:`WorkerTimeout`, with the stacks that the ranks were in. No process outlives the
call, nor the process that made it. Results travel as plain pickle bytes: torch.multiprocessing would pass tensors by
shared memory and file descriptor, which outlive a killed process.

Processes are forked where they can be. A fork has the model as it is, so nothing is pickled, and a script needs no
``if __name__ == "__main__"``. Where a fork could not compute they are spawned, and what they are given is pickled.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sptransform.diagnostics.errors import UsageError, describe

# After one rank has failed, how long the others may still answer: enough to hear of a failure they share.
GRACE = 1.0
LOG_TAIL = 4000
PROBE_TIMEOUT = 20.0
_FIX = (
    "processes=False; or a function that makes the model, of a module that can be imported: verify(make_model, ..); "
    "in a script, the call under if __name__ == '__main__'"
)


class WorkerFailure(Exception):
    """What went wrong on `ranks`, the first of them first."""

    def __init__(self, message: str, ranks: list[int]) -> None:
        super().__init__(message)
        self.ranks = ranks


class WorkerError(WorkerFailure):
    """The function raised on these ranks; the message holds the first one's traceback.

    `errors`: rank -> what it raised, where that can be pickled.
    """

    def __init__(self, message: str, errors: dict[int, BaseException | None]) -> None:
        super().__init__(message, list(errors))
        self.errors = errors


class WorkerDied(WorkerFailure):
    """The processes of these ranks ended, as after a crash in native code."""


class WorkerTimeout(WorkerFailure):
    """These ranks had not answered in time; the message holds the stacks they were in."""


@dataclass(frozen=True)
class Seat:
    """Where a process sits: its rank, a folder that all ranks share, and the way to whoever started it."""

    rank: int
    world_size: int
    directory: Path
    parent: Connection

    @property
    def log(self) -> Path:
        return self.directory / f"output{self.rank}"

    @property
    def stacks(self) -> Path:
        return self.directory / f"stacks{self.rank}"


@dataclass(frozen=True)
class _Raised:
    """A rank's answer when its function raised."""

    summary: str
    traceback: str
    error: BaseException | None


@dataclass(frozen=True)
class _Worker:
    seat: Seat
    process: BaseProcess
    connection: Connection

    @property
    def rank(self) -> int:
        return self.seat.rank

    def log_tail(self) -> str:
        log = self.seat.log
        text = log.read_text(errors="replace")[-LOG_TAIL:] if log.exists() else ""
        return f"\n--- output of rank {self.rank} ---\n{text}" if text.strip() else ""

    def stack(self) -> str:
        """The Python stacks of a process that is stuck, in native code or not."""
        if self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGUSR1)
        stacks = self.seat.stacks
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline and not stacks.stat().st_size:
            time.sleep(0.02)
        time.sleep(0.02)  # the handler writes line by line
        return f"\n--- stack of rank {self.rank} ---\n{stacks.read_text(errors='replace')}"


class Workers:
    """`world_size` processes that run `life(seat, *args)`, which answers with :func:`answered`."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._workers: list[_Worker] = []
        self._directory: Path | None = None

    def __bool__(self) -> bool:
        return bool(self._workers)

    def start(self, context: BaseContext, life: Callable[..., None], *args: Any) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="sptransform-gloo-"))
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            seat = Seat(rank, self.world_size, self._directory, theirs)
            seat.stacks.touch()
            process = context.Process(target=life, args=(seat, *args), daemon=True)
            start(process)
            theirs.close()
            self._workers.append(_Worker(seat, process, ours))

    def stop(self) -> None:
        """Kill the processes. They hold nothing that a shutdown in good order would save."""
        for worker in self._workers:
            worker.process.kill()
            worker.connection.close()
        for worker in self._workers:
            worker.process.join()
        self._workers = []
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def send(self, call: bytes) -> None:
        try:
            for worker in self._workers:
                worker.connection.send_bytes(call)
        except OSError:  # it ended after its last answer
            raise self._died({}) from None

    def collect(self, timeout: float) -> list[Any]:
        """One answer from each rank, or the failure that describes what came instead."""
        deadline = time.monotonic() + timeout
        answers: dict[int, Any] = {}
        raised: dict[int, _Raised] = {}
        while len(answers) < self.world_size:
            waiting = [worker for worker in self._workers if worker.rank not in answers]
            by_handle = {worker.connection: worker for worker in waiting}
            by_handle.update({worker.process.sentinel: worker for worker in waiting})  # type: ignore[dict-item]
            ready = wait(list(by_handle), max(0.0, deadline - time.monotonic()))
            if not ready and raised:
                break
            if not ready:
                raise self._timeout(waiting, timeout)
            for worker in {by_handle[handle].rank: by_handle[handle] for handle in ready}.values():
                try:
                    answer = pickle.loads(worker.connection.recv_bytes())
                except (EOFError, OSError):
                    raise self._died(raised) from None
                answers[worker.rank] = answer
                if isinstance(answer, _Raised):
                    raised[worker.rank] = answer
                    deadline = min(deadline, time.monotonic() + GRACE)
        if raised:
            raise self._raised(raised, sorted(set(range(self.world_size)) - set(answers)))
        return [answers[rank] for rank in range(self.world_size)]

    def _raised(self, raised: dict[int, _Raised], silent: list[int]) -> WorkerError:
        first, *others = raised
        lines = [f"rank {first} of {self.world_size} raised {raised[first].summary}"]
        lines += [f"rank {rank} raised {raised[rank].summary}" for rank in others]
        if silent:
            lines.append(f"no answer yet from ranks {silent}")
        lines.append(f"--- traceback of rank {first} ---\n{raised[first].traceback}")
        return WorkerError("\n".join(lines), {rank: answer.error for rank, answer in raised.items()})

    def _died(self, raised: dict[int, _Raised]) -> WorkerDied:
        time.sleep(0.2)  # a fault in gloo ends every rank at nearly the same moment: name them all
        dead = [worker for worker in self._workers if not worker.process.is_alive()]
        codes = ", ".join(f"rank {worker.rank} (exit code {worker.process.exitcode})" for worker in dead)
        message = f"the worker process ended: {codes}, of {self.world_size} ranks"
        message += "".join(f"\nrank {rank} raised {answer.summary}" for rank, answer in raised.items())
        return WorkerDied(message + "".join(worker.log_tail() for worker in dead), [w.rank for w in dead])

    def _timeout(self, stuck: list[_Worker], timeout: float) -> WorkerTimeout:
        ranks = [worker.rank for worker in stuck]
        message = f"no answer within {timeout:g} s from ranks {ranks} of {self.world_size}"
        message += "".join(worker.stack() + worker.log_tail() for worker in stuck)
        return WorkerTimeout(message, ranks)


# ---------------------------------------------------------------------------------------------------------------
# In the process of a rank.


def settle(seat: Seat) -> None:
    """Write to the rank's log, show stacks when asked, leave Ctrl-C to the parent, and end when that is gone."""
    output = seat.log.open("w", buffering=1)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = output
    faulthandler.enable(output)
    faulthandler.register(signal.SIGUSR1, seat.stacks.open("w"), all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow, daemon=True).start()
    # a fork has none of the threads that computed before it, and would wait for them
    torch.set_num_threads(1)


def _follow() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)


def join_group(seat: Seat, timeout: timedelta) -> None:
    # the host's own name need not resolve in a container
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = f"file://{seat.directory}/store"
    dist.init_process_group("gloo", init_method=store, rank=seat.rank, world_size=seat.world_size, timeout=timeout)


def answered(call: Callable[[], Any]) -> bytes:
    """What ``call()`` returns or raises, as `Workers.collect` reads it."""
    try:
        return pickle.dumps(call())
    except BaseException as error:
        summary, trace = "".join(traceback.format_exception_only(error)).strip(), traceback.format_exc()
        for kept in (error, None):
            with contextlib.suppress(Exception):
                found = pickle.dumps(_Raised(summary, trace, kept))
                pickle.loads(found)  # an error of more than one argument may be written, and not read
                return found
        raise


Call = tuple[Callable[..., Any], tuple[Any, ...]]


def _live(seat: Seat, call: Call | bytes, timeout: float) -> None:
    settle(seat)

    def run() -> Any:
        function, args = _loaded(call) if isinstance(call, bytes) else call
        if seat.world_size > 1:
            join_group(seat, timedelta(seconds=timeout))
        return function(seat.rank, seat.world_size, *args)

    seat.parent.send_bytes(answered(run))
    threading.Event().wait()  # peers may still read what it sent


def _loaded(call: bytes) -> Call:
    try:
        return pickle.loads(call)
    except Exception as error:
        what = "a new process cannot read the model, or what came with it"
        raise UsageError(describe(what, found=f"{type(error).__name__}: {error}", fix=_FIX)) from error


# ---------------------------------------------------------------------------------------------------------------
# In the process that asks.


def on_processes(world_size: int, function: Callable[..., Any], *args: Any, timeout: float) -> list[Any]:
    """``function(rank, world_size, *args)`` on new processes of one gloo group; the results in rank order.

    Raises:
        UsageError: processes have to be spawned, and the arguments cannot be pickled.
        WorkerFailure: a rank raised, ended, or did not answer within ``timeout`` seconds.
    """
    method = "fork" if can_fork() else "spawn"
    workers = Workers(world_size)
    try:
        call = (function, args) if method == "fork" else _dumped((function, args))
        workers.start(multiprocessing.get_context(method), _live, call, timeout)
        return workers.collect(timeout)
    finally:  # also reached when Ctrl-C interrupts the wait
        workers.stop()


def _dumped(call: Call) -> bytes:
    try:
        return pickle.dumps(call)
    except Exception as error:
        what = "the model, or what came with it, cannot be sent to a new process"
        raise UsageError(describe(what, found=f"{type(error).__name__}: {error}", fix=_FIX)) from error


def start(process: BaseProcess) -> None:
    """Start a process. Python warns of other threads at a fork; :func:`can_fork` tries whether they are in the way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()


def can_fork() -> bool:
    """Whether a fork of this process can compute: a forked process says so.

    It cannot where a GPU is in use, or where autograd has started the threads that it has for GPUs; nor join a group
    where this process is in one.
    """
    if "fork" not in multiprocessing.get_all_start_methods() or torch.cuda.is_initialized() or dist.is_initialized():
        return False
    process = multiprocessing.get_context("fork").Process(target=_compute, daemon=True)
    start(process)
    process.join(PROBE_TIMEOUT)
    can = process.exitcode == 0
    process.kill()
    process.join()
    return can


def _compute() -> None:
    torch.set_num_threads(1)
    try:
        torch.ones(64, 64, requires_grad=True).mm(torch.ones(64, 64)).sum().backward()
    except RuntimeError:
        sys.exit(1)
