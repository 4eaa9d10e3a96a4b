"""A training step on two streams: kernels in program order, and messages beside them or between them."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from sptransform.cost.hardware import Hardware, HardwareLike, hardware_of
from sptransform.cost.records import Message, Step, Work
from sptransform.cost.times import overlaps, seconds


@dataclass(frozen=True)
class Event:
    """One op of the step, as it ran.

    Attributes:
        work: the op, with ``copies`` 1.
        stream: "compute" or "communication".
        start: seconds from the start of the step.
        end: as ``start``; of a "wait", when its message has come.
        live: the most bytes held during the op, before it frees any.
        repeats: how often it runs again in equal layers, each ``period`` later, with ``growth`` more bytes held.
        period: seconds.
        growth: bytes.
    """

    work: Work
    stream: str
    start: float
    end: float
    live: int
    repeats: int = 0
    period: float = 0.0
    growth: int = 0

    def each(self) -> Iterator[Event]:
        """This event and its repeats, one by one."""
        for index in range(self.repeats + 1):
            delay = index * self.period
            live = self.live + index * self.growth
            yield Event(self.work, self.stream, self.start + delay, self.end + delay, live)


@dataclass(frozen=True)
class Timeline:
    """What a rank does when.

    Attributes:
        seconds: from the start of the step to the end of its last op.
        compute_seconds: of all kernels.
        communication_seconds: of all messages.
        peak_bytes: the most held at a time, parameters, inputs and gradients included.
        events: in the order they were issued.
        hardware: its name.
        memory_bytes: what a device of it has; None if it does not say.
    """

    seconds: float
    compute_seconds: float
    communication_seconds: float
    peak_bytes: int
    events: tuple[Event, ...] = field(repr=False)
    hardware: str = ""
    memory_bytes: int | None = None

    @property
    def exposed_seconds(self) -> float:
        """How long no kernel runs, for a message that is waited for."""
        return max(self.seconds - self.compute_seconds, 0.0)

    def unrolled(self) -> Iterator[Event]:
        """Every event of every layer, by start."""
        yield from sorted((each for event in self.events for each in event.each()), key=lambda event: event.start)

    def live_bytes(self) -> Iterator[tuple[float, int]]:
        """(seconds, bytes held) after each op, by time."""
        yield from ((event.end, event.live) for event in self.unrolled() if event.work.kind != "message")


def simulate(step: Step, hardware: HardwareLike, *, overlap: bool | None = None) -> Timeline:
    """Run a step on two streams.

    Ops start in program order. A message starts when the kernels before it are done, and the messages before it; it
    runs beside kernels until it is waited for, or alone. All ranks are taken to do the same at the same time, so that
    a hop of a ring ends when this rank's own does.

    Args:
        step: of one rank.
        hardware: a name, a file, or hardware.
        overlap: whether messages run beside kernels; None is what the hardware says of its links.

    Raises:
        UsageError: the hardware is unknown, or has no link that the ranks need.
    """
    hardware = hardware_of(hardware)
    run = _Run(hardware, overlap, step.parameters + step.inputs)
    for works in step.blocks():
        run.block([replace(work, copies=1, run="") for work in works], works[0].copies)
    return Timeline(
        max(run.computed, run.sent),
        run.compute,
        run.communication,
        run.peak,
        tuple(run.events),
        hardware.name,
        hardware.get("memory.bytes"),
    )


class _Run:
    """The state of both streams."""

    def __init__(self, hardware: Hardware, overlap: bool | None, live: int) -> None:
        self.hardware, self.overlap = hardware, overlap
        self.computed = self.sent = 0.0  # when each stream is done
        self.compute = self.communication = 0.0
        self.live = self.peak = live
        self.pending: dict[Message, deque[float]] = defaultdict(deque)  # when messages not yet waited for are done
        self.events: list[Event] = []

    def block(self, works: Sequence[Work], copies: int) -> None:
        """Run equal layers. If one leaves the streams as it found them, all that follow do."""
        found = self.state()
        peak, self.peak = self.peak, self.live
        for index in range(copies):
            mark, before = len(self.events), (self.computed, self.live, self.compute, self.communication)
            for work in works:
                self.issue(work)
            found, was = self.state(), found
            if index + 1 < copies and _same(found, was):
                self.repeat(copies - index - 1, mark, *before)
                break
        self.peak = max(self.peak, peak)

    def repeat(self, times: int, mark: int, computed: float, live: int, compute: float, communication: float) -> None:
        """Repeat what ran since the streams had these values, and the events were so many."""
        period, growth = self.computed - computed, self.live - live
        for place in range(mark, len(self.events)):
            self.events[place] = replace(self.events[place], repeats=times, period=period, growth=growth)
        self.computed += times * period
        self.sent += times * period
        self.compute += times * (self.compute - compute)
        self.communication += times * (self.communication - communication)
        self.live += times * growth
        self.peak = max(self.peak, self.peak + times * growth)
        for ends in self.pending.values():
            for place, done in enumerate(ends):
                ends[place] = done + times * period

    def issue(self, work: Work) -> None:
        taken = seconds(work, self.hardware)
        self.live += work.allocated
        self.peak = max(self.peak, self.live + work.scratch)
        if work.kind == "wait":
            done = self.pending[work.message].popleft() if self.pending.get(work.message) else self.computed
            start, self.computed = self.computed, max(self.computed, done)
            self.record(work, "compute", start, self.computed)
        elif work.kind == "message":
            self.send(work, taken)
        else:
            start, self.computed = self.computed, self.computed + taken
            self.compute += taken
            self.record(work, "compute", start, self.computed)
        self.live -= work.freed

    def send(self, work: Work, taken: float) -> None:
        assert work.message is not None
        start = max(self.computed, self.sent)
        self.sent = start + taken
        self.communication += taken
        beside = overlaps(work.message, self.hardware) if self.overlap is None else self.overlap
        if beside:
            self.pending[work.message].append(self.sent)
        else:
            self.computed = self.sent
        self.record(work, "communication", start, self.sent)

    def record(self, work: Work, stream: str, start: float, end: float) -> None:
        self.events.append(Event(work, stream, start, end, self.live + work.scratch))

    def state(self) -> tuple[object, ...]:
        """How far the other stream, and the messages under way, are ahead of the kernels."""
        pending = {message: [done - self.computed for done in ends] for message, ends in self.pending.items() if ends}
        return max(self.sent - self.computed, 0.0), pending


def _same(state: tuple[object, ...], before: tuple[object, ...]) -> bool:
    ahead, pending = state
    was_ahead, was_pending = before
    return (
        _close(ahead, was_ahead)
        and pending.keys() == was_pending.keys()
        and all(
            len(ends) == len(was_pending[message]) and all(map(_close, ends, was_pending[message]))
            for message, ends in pending.items()
        )
    )


def _close(x: float, y: float) -> bool:
    return math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-12)
