"""Run the sweep: every architecture in a process of its own, some at a time, under limits of time and memory."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

from sptransform.sweep.records import Record, Status
from sptransform.sweep.registries import Architecture, versions
from sptransform.sweep.worker import work
from sptransform.testing.pretended import Asked

# processes are forked from one that has these; what is not installed is passed over
PRELOADED = ["transformers.models.auto.modeling_auto", "diffusers.models.transformers", "sptransform.sweep.warm"]

# how much longer than its processor time a process may take, before it is taken to hang
PATIENCE = 30


@dataclass(frozen=True)
class Limits:
    """Of one architecture: seconds of processor time, so that a busy machine finds the same; bytes of address space."""

    seconds: int = 240
    memory: int = 16 << 30


@dataclass
class _Running:
    """One process, and what is still to come from it."""

    architecture: Architecture
    left: list[Asked]
    process: multiprocessing.process.BaseProcess
    receiver: Connection
    deadline: float

    def received(self) -> Iterator[Record]:
        """What has come; at its end, what never will."""
        with suppress(EOFError):
            while self.receiver.poll():
                record: Record = self.receiver.recv()
                done = (record.strategy, record.ranks)
                all_at_once = record.status is Status.NOT_BUILT
                self.left = [] if all_at_once else [a for a in self.left if (str(a.strategy), a.num_ranks) != done]
                yield record
            return
        self.process.join()
        code = self.process.exitcode
        yield from self.lost("not done in time" if code == -signal.SIGXCPU else f"the process ended with code {code}")

    def lost(self, reason: str) -> Iterator[Record]:
        """Stop it; what is left has crashed."""
        self.process.kill()
        self.process.join()
        self.receiver.close()
        name, family = self.architecture.name, self.architecture.family
        for each in self.left:
            yield Record(name, family, str(each.strategy), each.num_ranks, Status.CRASHED, versions(), reason=reason)
        self.left = []


def run(
    todo: Sequence[tuple[Architecture, list[Asked]]], jobs: int, limits: Limits, log: Path
) -> Iterator[tuple[Architecture, Record | None]]:
    """Records as they come; None after the last of an architecture."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    waiting, running = list(todo), []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(_started(context, *waiting.pop(0), limits, log))
        wait([each.receiver for each in running], timeout=1.0)
        for each in list(running):
            for record in each.received():
                yield each.architecture, record
            if each.left and time.monotonic() > each.deadline:
                for record in each.lost("it hangs"):
                    yield each.architecture, record
            if not each.left:
                each.process.kill()
                each.process.join()
                running.remove(each)
                yield each.architecture, None


def _started(
    context: multiprocessing.context.ForkServerContext,
    architecture: Architecture,
    asked: list[Asked],
    limits: Limits,
    log: Path,
) -> _Running:
    receiver, sender = context.Pipe(duplex=False)
    arguments = (architecture, asked, limits.seconds, limits.memory, sender, str(log))
    process = context.Process(target=work, args=arguments, daemon=True)
    process.start()
    sender.close()
    return _Running(architecture, list(asked), process, receiver, time.monotonic() + PATIENCE * limits.seconds)


def pending(
    architectures: Sequence[Architecture], asked: Sequence[Asked], known: Sequence[Record], again: frozenset[Status]
) -> list[tuple[Architecture, list[Asked]]]:
    """What is still to do; records of a status in ``again`` count as not done."""
    now = versions()
    keys = {record.key for record in known if record.status not in again}
    found = []
    for architecture in architectures:
        blank = Record(architecture.name, architecture.family, "", 0, Status.NOT_BUILT, now)
        if blank.key in keys:
            continue
        left = [a for a in asked if replace(blank, strategy=str(a.strategy), ranks=a.num_ranks).key not in keys]
        if left:
            found.append((architecture, left))
    # one of each family in turn, so that a sweep that is stopped knows something of all
    turns: Counter[str] = Counter()
    ordered = []
    for architecture, left in found:
        ordered.append((turns[architecture.family], architecture, left))
        turns[architecture.family] += 1
    return [(architecture, left) for _, architecture, left in sorted(ordered, key=lambda each: each[0])]
