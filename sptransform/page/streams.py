"""The two streams of one layer, as a picture has them: what runs when, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sptransform.cost.simulate import Event
from sptransform.page.folding import Key, Segment, layer_of
from sptransform.page.graphs import Lines
from sptransform.planning.records import Option

STREAMS = ("compute", "communication")
# events of other layers between two of one layer, from which on they do not belong together
FAR = 12


def lane_events(option: Option, segments: Sequence[Segment], lines: Lines) -> dict[str, Any] | None:
    """The events of one layer of the segment with the most layers; None without times.

    Of each direction ``(stream, kind, place, start, length)``, in microseconds from the direction's start.
    """
    if option.timeline is None or not any(segment.keys[0].prefix for segment in segments):
        return None
    most = max(segments, key=lambda segment: segment.times if segment.keys[0].prefix else 0)
    key = most.keys[len(most.keys) // 2]
    found: dict[str, Any] = {"layer": f"{key.prefix}.{key.index}".lstrip(".")}
    for direction in ("forward", "backward"):
        own = _stretch([event for event in option.timeline.events if event.work.direction == direction], key)
        start = min((event.start for event in own), default=0.0)
        found[direction] = [
            (
                STREAMS.index(event.stream),
                event.work.message.kind if event.work.message else event.work.kind,
                lines.place(event.work.op, event.work.layer, event.work.source_line),
                round((event.start - start) * 1e6, 1),
                round((event.end - event.start) * 1e6, 1),
            )
            for event in own
            if event.work.kind != "wait"
        ]
    return found


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
