"""The two streams of one layer, as a picture has them: what runs when, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sptransform.cost.records import Work
from sptransform.cost.simulate import Event
from sptransform.page.folding import Key, Segment, layer_of
from sptransform.page.graphs import Lines
from sptransform.page.traffic import DIRECTIONS, KINDS
from sptransform.planning.records import Option

STREAMS = ("compute", "communication")
KERNELS = ("attention", "matmul", "memory")
# of the longer direction
TICKS = 5_000
# events of other layers between two of one layer, from which on they do not belong together
FAR = 12


def lane_events(option: Option, segments: Sequence[Segment], lines: Lines) -> dict[str, Any] | None:
    """The events of one layer of the segment with the most layers; None without times.

    Of each direction one list of ``kind, place, gap, length`` of every event: a gap is from the end of what ran before
    on its stream, in units. ``lasts``: seconds of each direction. What communicates is the other stream.
    """
    if option.timeline is None or not any(segment.keys[0].prefix for segment in segments):
        return None
    most = max(segments, key=lambda segment: segment.times if segment.keys[0].prefix else 0)
    key = most.keys[len(most.keys) // 2]
    stretches = [_stretch([e for e in option.timeline.events if e.work.direction == each], key) for each in DIRECTIONS]
    starts = [min((event.start for event in own), default=0.0) for own in stretches]
    lasts = [
        max((event.end for event in own), default=0.0) - start for own, start in zip(stretches, starts, strict=True)
    ]
    unit = max(*lasts, 1e-9) / TICKS
    found: dict[str, Any] = {
        "layer": f"{key.prefix}.{key.index}".lstrip("."),
        "unit": float(f"{unit:.6g}"),
        "lasts": [float(f"{last:.6g}") for last in lasts],
    }
    for direction, own, start in zip(DIRECTIONS, stretches, starts, strict=True):
        found[direction] = list(_flat([event for event in own if event.work.kind != "wait"], start, unit, lines))
    return found


def _flat(events: Sequence[Event], origin: float, unit: float, lines: Lines) -> Iterator[int]:
    done = dict.fromkeys(STREAMS, 0)
    for event in events:
        start, end = (round((at - origin) / unit) for at in (event.start, event.end))
        yield _shown_kind(event.work)
        yield lines.place(event.work.op, event.work.layer, event.work.source_line)
        yield from (start - done[event.stream], end - start)
        done[event.stream] = end


def _shown_kind(work: Work) -> int:
    """The number of the collective, or, after these, of the kind of kernel."""
    return KINDS.index(work.message.kind) if work.message else len(KINDS) + KERNELS.index(work.kind)


def _stretch(events: Sequence[Event], key: Key) -> Sequence[Event]:
    """What runs while the layer does: from its first event to its last.

    A few ops of a layer may run far from it, as those do that give what the model returns its place; they are left out.
    """
    own = [at for at, event in enumerate(events) if layer_of(event.work.layer) == (key.prefix, key.index)]
    groups: list[list[int]] = []
    for at in own:
        if groups and at - groups[-1][-1] <= FAR:
            groups[-1].append(at)
        else:
            groups.append([at])
    most = max(groups, key=len, default=[0])
    return events[most[0] : most[-1] + 1] if own else ()
