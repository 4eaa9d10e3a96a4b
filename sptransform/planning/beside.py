"""A call beside this process: a fork computes it while this process goes on. Results are those of a plain call."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

import torch

from sptransform.testing.processes import can_fork, start

T = TypeVar("T")
TIMEOUT = 60.0  # seconds that a fork gets once its result is asked for; after that it is ended, and not waited for


class Beside:
    """Computes calls in a fork, one at a time, and what comes meanwhile here: two cores have work, this one first.

    Everything is computed here where there is one core, where a fork cannot compute, and after a fork that failed. A
    fork that cannot be started, raises, ends or hangs costs time, not the result: the call is then made here.
    """

    def __init__(self) -> None:
        self._running: _Forked[Any] | None = None
        self._may_fork = False
        with suppress(OSError):  # too little memory, or too many processes or files, for one more
            self._may_fork = _has_two_cores() and not multiprocessing.current_process().daemon and can_fork()

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, *_: object) -> None:
        if self._running is not None:
            self._running.end()

    def call(self, compute: Callable[[], T]) -> Callable[[], T]:
        """``compute()`` as a function that gives its result; that can be pickled. What it changes may be lost."""
        running = self._running
        if running is not None and running.has_answered:
            running()  # takes the answer, which the fork may be waiting to write
            self._running, self._may_fork = None, not running.failed
        # fake tensors of a GPU may have made its context since
        if self._running is None and self._may_fork and not torch.cuda.is_initialized():
            try:
                self._running = forked = _Forked(compute)
                return forked
            except OSError:
                self._may_fork = False
        result = compute()
        return lambda: result


class _Forked(Generic[T]):
    """One call that a fork computes. ``failed``: it gave no result, so that the call was made here."""

    def __init__(self, compute: Callable[[], T]) -> None:
        self._compute = compute
        self._results: list[T] = []
        self.failed = False
        self._answers, answering = multiprocessing.Pipe(duplex=False)
        self._process = multiprocessing.get_context("fork").Process(
            target=_answer, args=(compute, answering, self._answers), daemon=True
        )
        try:
            start(self._process)
        except OSError:
            self._answers.close()
            raise
        finally:
            answering.close()

    @property
    def has_answered(self) -> bool:
        return bool(self._results) or self._answers.poll()

    def __call__(self) -> T:
        if not self._results:
            self._results.append(self._result())
        return self._results[0]

    def _result(self) -> T:
        try:
            if self._answers.poll(TIMEOUT):
                return pickle.loads(self._answers.recv_bytes())
        except (EOFError, OSError, pickle.UnpicklingError):
            pass  # the fork is gone
        finally:
            self.end()
        self.failed = True
        return self._compute()

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self._answers.close()


def _answer(compute: Callable[[], Any], answering: Connection, answers: Connection) -> None:
    """In the fork: write the result. Of an error nothing is written: who asked gets it from a call of its own."""
    answers.close()  # held open here, it would keep a write waiting for a reader that was killed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    torch.set_num_threads(1)  # a fork has none of the threads that computed before it, and would wait for them
    try:
        answer = pickle.dumps(compute())
    except Exception:
        return
    with suppress(OSError):  # who asked is gone
        answering.send_bytes(answer)


def _has_two_cores() -> bool:
    return hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) > 1
