"""Persistent gloo worker processes, so that a distributed test costs milliseconds, not a start of Python.

`get_pool(world_size).run(function, *args)` calls `function(rank, world_size, *args)` on every rank and
returns the results in rank order. There is one pool for each world size, started when first used and stopped
by `stop_pools`.

- An exception on any rank is a `WorkerError`, a process that ends is a `WorkerDied`, silence is a
  `WorkerTimeout`. Each names its ranks.
- After any of them the pool starts again: other ranks may wait in a collective that will never complete.
- Arguments and results travel as plain pickle bytes. torch.multiprocessing would pass tensors by shared
  memory and file descriptor, which outlive a killed worker.
"""

import atexit
import faulthandler
import functools
import gc
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

REACH = "SPTRANSFORM_REACH"  # the environment variable that says where to record which lines a test reaches
START_TIMEOUT = 60.0
COLLECTIVE_TIMEOUT = timedelta(seconds=60)
# After one rank has failed, how long the others may still answer: enough to hear of a failure they share.
GRACE = 1.0
LOG_TAIL = 4000

# Imported once, before the workers fork: else the first compile of each worker takes seconds to import it.
# Only what starts no threads: a fork keeps none but its own.
PRELOAD = [
    "numpy",
    "sptransform.compiler.backend",
    "torch",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.tensor",
    "transformers.modeling_utils",
    "transformers.models.bert.modeling_bert",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.gpt_neox.modeling_gpt_neox",
    "transformers.models.llama.modeling_llama",
    "transformers.models.opt.modeling_opt",
    "transformers.models.qwen3.modeling_qwen3",
]


def current_test() -> str:
    """The running test's name, as pytest takes it; "" outside of tests."""
    return os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]


def collect_seldom() -> None:
    """Spare a sixth of the time: the libraries' own objects, which are many, are none to collect again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


class WorkerFailure(Exception):
    """What went wrong on `ranks` of a pool, the first of them first."""

    def __init__(self, message: str, ranks: list[int]) -> None:
        super().__init__(message)
        self.ranks = ranks


class WorkerError(WorkerFailure):
    """The function raised on these ranks; the message holds the first one's traceback."""


class WorkerDied(WorkerFailure):
    """The processes of these ranks ended, as after a crash in native code."""


class WorkerTimeout(WorkerFailure):
    """These ranks had not answered in time; the message holds the stacks they were in."""


@dataclass(frozen=True)
class _Raised:
    """A rank's answer when its function raised."""

    summary: str
    traceback: str


@dataclass(frozen=True)
class _Worker:
    rank: int
    process: BaseProcess
    connection: Connection
    log: Path
    stacks: Path

    def log_tail(self) -> str:
        text = self.log.read_text(errors="replace")[-LOG_TAIL:] if self.log.exists() else ""
        return f"\n--- output of rank {self.rank} ---\n{text}" if text.strip() else ""

    def stack(self) -> str:
        """The Python stacks of a worker that is stuck, in native code or not."""
        if self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGUSR1)
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline and not self.stacks.stat().st_size:
            time.sleep(0.02)
        time.sleep(0.02)  # the handler writes line by line
        return f"\n--- stack of rank {self.rank} ---\n{self.stacks.read_text(errors='replace')}"


class Pool:
    """`world_size` gloo workers of one process group; see the module's docstring.

    Workers that use a GPU are spawned: CUDA does not survive a fork.
    """

    def __init__(self, world_size: int, *, spawn: bool = False) -> None:
        self.world_size, self.spawn = world_size, spawn
        self._workers: list[_Worker] = []
        self._directory: Path | None = None

    def run(
        self, function: Callable[..., Any], *args: Any, timeout: float = 120.0, **kwargs: Any
    ) -> list[Any]:
        """Call `function(rank, world_size, *args, **kwargs)` on every rank; its results in rank order."""
        call = pickle.dumps((current_test(), function, args, kwargs))
        in_step = False
        try:
            self.start()
            try:
                for worker in self._workers:
                    worker.connection.send_bytes(call)
            except OSError:  # it ended after its last answer
                raise self._died({}) from None
            results = self._collect(timeout)
            in_step = True
            return results
        finally:
            # Also reached when pytest-timeout or Ctrl-C interrupts the wait.
            if not in_step:
                self.stop()

    def start(self) -> None:
        """Start the workers unless they run already; the next `run` needs no call of this."""
        if self._workers:
            return
        self._directory = Path(tempfile.mkdtemp(prefix="sptransform-gloo-"))
        context = multiprocessing.get_context("spawn" if self.spawn else "forkserver")
        if not self.spawn:
            context.set_forkserver_preload(PRELOAD)
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            log, stacks = self._directory / f"output{rank}", self._directory / f"stacks{rank}"
            stacks.touch()
            process = context.Process(
                target=_work,
                args=(rank, self.world_size, self._directory, log, stacks, theirs),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._workers.append(_Worker(rank, process, ours, log, stacks))
        self._collect(START_TIMEOUT)

    def stop(self) -> None:
        """Kill the workers. They hold nothing that a shutdown in good order would save."""
        for worker in self._workers:
            worker.process.kill()
            worker.connection.close()
        for worker in self._workers:
            worker.process.join()
        self._workers = []
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _collect(self, timeout: float) -> list[Any]:
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
        return WorkerError("\n".join(lines), list(raised))

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


@functools.cache
def get_pool(world_size: int, *, spawn: bool = False) -> Pool:
    """The one pool of this world size, and way to start."""
    pool = Pool(world_size, spawn=spawn)
    _pools.append(pool)
    return pool


def stop_pools() -> None:
    """Stop the workers of every pool; a later `run` would start them again."""
    for pool in _pools:
        pool.stop()


_pools: list[Pool] = []
atexit.register(stop_pools)


def _work(rank: int, world_size: int, directory: Path, log: Path, stacks: Path, parent: Connection) -> None:
    """The life of a worker: join the group, say so, then answer calls until the parent is gone."""
    output = log.open("w")
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = output
    faulthandler.enable(output)
    stack_file = stacks.open("w")
    faulthandler.register(signal.SIGUSR1, stack_file, all_threads=True)

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # The host's own name need not resolve in a container.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # Else torch's flight recorder keeps the last 2000 collectives, with the code that called them, and with it every
    # graph that was compiled: memory, and ever longer garbage collections.
    os.environ["TORCH_FR_BUFFER_SIZE"] = "0"
    # Inductor's own pool of compiler processes would be one for each worker.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    recorded = _recorded()
    _reset()
    collect_seldom()
    parent.send_bytes(pickle.dumps(None))
    while True:
        try:
            call = parent.recv_bytes()
        except EOFError:
            return
        parent.send_bytes(_answer(call, rank, world_size, recorded))
        output.flush()
        _reset()


Recorded = Callable[[str], AbstractContextManager[None]]


def _recorded() -> Recorded:
    """Where `make mutants` asks which lines a test reaches, this notes what runs inside."""
    if REACH not in os.environ:
        return lambda test: nullcontext()
    from tests.mutants.recorder import Recorder

    return Recorder().during


def _answer(call: bytes, rank: int, world_size: int, recorded: Recorded) -> bytes:
    try:
        test, function, args, kwargs = pickle.loads(call)
        with recorded(test):
            return pickle.dumps(function(rank, world_size, *args, **kwargs))
    except BaseException as error:
        summary = "".join(traceback.format_exception_only(error)).strip()
        return pickle.dumps(_Raised(summary, traceback.format_exc()))


def _reset() -> None:
    """Let no call see what the last one left: compiled code, random state, tensors."""
    import torch

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    seed_everything()
    gc.collect(1)  # what is older is rarely garbage, and takes long to look through


def seed_everything() -> None:
    """The random state of a new process that nobody seeded otherwise."""
    import numpy
    import torch

    torch.manual_seed(0)
    numpy.random.seed(0)
    random.seed(0)
