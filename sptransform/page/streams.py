"""The two streams of one layer, as a picture has them: what runs when, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sptransform.page.folding import Segment, layer_of
from sptransform.page.graphs import source
from sptransform.planning.records import Option

STREAMS = ("compute", "communication")


def lane_events(option: Option, segments: Sequence[Segment]) -> dict[str, Any] | None:
    """The events of one layer of the segment with the most layers; None without times.

    Of each direction ``(stream, kind, op, source line, start, length)``, in microseconds from the direction's start.
    """
    if option.timeline is None or not any(segment.keys[0].prefix for segment in segments):
        return None
    most = max(segments, key=lambda segment: segment.times if segment.keys[0].prefix else 0)
    key = most.keys[len(most.keys) // 2]
    found: dict[str, Any] = {"layer": f"{key.prefix}.{key.index}".lstrip(".")}
    for direction in ("forward", "backward"):
        own = [
            event
            for event in option.timeline.events
            if event.work.direction == direction and layer_of(event.work.layer) == (key.prefix, key.index)
        ]
        start = min((event.start for event in own), default=0.0)
        found[direction] = [
            (
                STREAMS.index(event.stream),
                event.work.message.kind if event.work.message else event.work.kind,
                event.work.op,
                source(event.work.source_line),
                round((event.start - start) * 1e6, 3),
                round((event.end - event.start) * 1e6, 3),
            )
            for event in own
            if event.work.kind != "wait"
        ]
    return found
