"""A simulated step as a trace for Perfetto and chrome://tracing, in the Trace Event Format of Chromium."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sptransform.cost.simulate import Event, Timeline

#: threads of a process, which is a rank
STREAMS = ("compute", "communication")
#: ranks that are drawn if nobody says which: more make no trace clearer, and its file larger
RANKS = 8

Entry = dict[str, Any]


def write_trace(timeline: Timeline, path: str | Path, ranks: Sequence[int], rank: int = 0) -> None:
    """Write the step of ``rank`` once for each of ``ranks``: what is simulated takes all ranks to do the same.

    A process is a rank, with a track for kernels and one for messages, and a counter of live bytes. Arrows lead from
    each hop of a ring to where the neighbour waits for it. Times are in microseconds.
    """
    entries = [*_names(ranks), *_of_all(list(timeline.unrolled()), ranks)]
    data = {
        "traceEvents": entries,
        "displayTimeUnit": "ms",
        "otherData": {"times": f"simulated for {timeline.hardware}", "bytes": "counted", "rank": rank},
    }
    Path(path).write_text(json.dumps(data, separators=(",", ":")))


def _names(ranks: Sequence[int]) -> Iterator[Entry]:
    for rank in ranks:
        yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}
        yield {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}}
        for thread, name in enumerate(STREAMS):
            yield {"ph": "M", "name": "thread_name", "pid": rank, "tid": thread, "args": {"name": name}}


def _of_all(events: Sequence[Event], ranks: Sequence[int]) -> Iterator[Entry]:
    arrows = dict(_hops(events))
    for rank in ranks:
        for number, event in enumerate(events):
            yield _slice(event, rank)
            if event.work.kind != "message":
                at = _microseconds(event.end)
                yield {"ph": "C", "name": "live bytes", "pid": rank, "ts": at, "args": {"bytes": event.live}}
            # rank's hop goes to the next rank of its group, where an event with the same number ends it
            if number in arrows and (target := _next(event, rank)) in ranks:
                yield from _arrow(event, events[arrows[number]], rank, target, f"{number}.{rank}")


def _slice(event: Event, rank: int) -> Entry:
    work = event.work
    args: Entry = {"node": work.name, "module": work.layer, "direction": work.direction}
    args |= {"line": work.source_line} if work.source_line else {}
    args |= {"flops": work.flops} if work.flops else {}
    args |= {"traffic bytes": work.traffic} if work.traffic else {}
    if work.message is not None:
        args |= {"bytes sent": work.message.bytes_sent, "ranks": len(work.message.ranks)}
    name = work.message.kind if work.kind == "message" and work.message else work.op
    return {
        "ph": "X",
        "name": f"wait for {work.message.kind}" if work.kind == "wait" and work.message else name,
        "cat": work.kind,
        "pid": rank,
        "tid": STREAMS.index(event.stream),
        "ts": _microseconds(event.start),
        "dur": _microseconds(event.end - event.start),
        "args": args,
    }


def _hops(events: Sequence[Event]) -> Iterator[tuple[int, int]]:
    """(the number of a hop, the number of its wait): waits are for messages in the order in which these were sent."""
    sent: dict[Any, list[int]] = {}
    for number, event in enumerate(events):
        message = event.work.message
        if message is None or message.kind != "send_recv":
            continue
        if event.work.kind == "message":
            sent.setdefault(message, []).append(number)
        elif sent.get(message):
            yield sent[message].pop(0), number


def _next(event: Event, rank: int) -> int | None:
    """The rank after ``rank`` in the ring; None where the group has others only, as those of a mesh have."""
    group = event.work.message.ranks
    return group[(group.index(rank) + 1) % len(group)] if rank in group else None


def _arrow(hop: Event, wait: Event, source: int, target: int, number: str) -> Iterator[Entry]:
    common = {"cat": "hop", "name": "hop", "id": number}
    yield {**common, "ph": "s", "pid": source, "tid": STREAMS.index(hop.stream), "ts": _microseconds(hop.start)}
    yield {
        **common,
        "ph": "f",
        "bp": "e",
        "pid": target,
        "tid": STREAMS.index(wait.stream),
        "ts": _microseconds(wait.start),
    }


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)
