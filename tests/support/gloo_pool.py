"""Persistent gloo worker processes, so that a distributed test costs milliseconds, not a start of Python.

`get_pool(world_size).run(function, *args)` calls `function(rank, world_size, *args)` on every rank and
returns the results in rank order. There is one pool for each world size, started when first used and stopped
by `stop_pools`.

- What goes wrong names its ranks: `WorkerError`, `WorkerDied`, `WorkerTimeout`, see `sptransform/testing/processes.py`.
- After any of them the pool starts again: other ranks may wait in a collective that will never complete.
"""

import atexit
import functools
import gc
import multiprocessing
import os
import pickle
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

from sptransform.testing.processes import (
    Seat,
    WorkerDied,
    WorkerError,
    Workers,
    WorkerTimeout,
    answered,
    join_group,
    settle,
)

__all__ = ["Pool", "WorkerDied", "WorkerError", "WorkerTimeout", "get_pool", "stop_pools"]

REACH = "SPTRANSFORM_REACH"  # the environment variable that says where to record which lines a test reaches
START_TIMEOUT = 60.0
COLLECTIVE_TIMEOUT = timedelta(seconds=60)

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


class Pool:
    """`world_size` gloo workers of one process group; see the module's docstring.

    Workers that use a GPU are spawned: CUDA does not survive a fork.
    """

    def __init__(self, world_size: int, *, spawn: bool = False) -> None:
        self.world_size, self.spawn = world_size, spawn
        self._workers = Workers(world_size)

    def run(
        self, function: Callable[..., Any], *args: Any, timeout: float = 120.0, **kwargs: Any
    ) -> list[Any]:
        """Call `function(rank, world_size, *args, **kwargs)` on every rank; its results in rank order."""
        call = pickle.dumps((current_test(), function, args, kwargs))
        in_step = False
        try:
            self.start()
            self._workers.send(call)
            results = self._workers.collect(timeout)
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
        context = multiprocessing.get_context("spawn" if self.spawn else "forkserver")
        if not self.spawn:
            context.set_forkserver_preload(PRELOAD)
        self._workers.start(context, _work)
        self._workers.collect(START_TIMEOUT)

    def stop(self) -> None:
        self._workers.stop()


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


def _work(seat: Seat) -> None:
    """The life of a worker: join the group, say so, then answer calls until the parent is gone."""
    settle(seat)
    # Else torch's flight recorder keeps the last 2000 collectives, with the code that called them, and with it every
    # graph that was compiled: memory, and ever longer garbage collections.
    os.environ["TORCH_FR_BUFFER_SIZE"] = "0"
    # Inductor's own pool of compiler processes would be one for each worker.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    join_group(seat, COLLECTIVE_TIMEOUT)
    recorded = _recorded()
    _reset()
    collect_seldom()
    seat.parent.send_bytes(answered(lambda: None))
    while True:
        try:
            call = seat.parent.recv_bytes()
        except EOFError:
            return
        seat.parent.send_bytes(answered(functools.partial(_run, call, seat, recorded)))
        _reset()


Recorded = Callable[[str], AbstractContextManager[None]]


def _recorded() -> Recorded:
    """Where `make mutants` asks which lines a test reaches, this notes what runs inside."""
    if REACH not in os.environ:
        return lambda test: nullcontext()
    from tests.mutants.recorder import Recorder

    return Recorder().during


def _run(call: bytes, seat: Seat, recorded: Recorded) -> Any:
    test, function, args, kwargs = pickle.loads(call)
    with recorded(test):
        return function(seat.rank, seat.world_size, *args, **kwargs)


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
