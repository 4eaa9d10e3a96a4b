"""Where the bytes go: what a rank sends, by kind of collective, direction and part of the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sptransform.inspection.records import Facts
from sptransform.page.folding import Segment, inside, layer_of

KINDS = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce", "send_recv")


@dataclass(frozen=True)
class Sent:
    """Messages of one kind in one direction from one place.

    Attributes:
        segment: the title of a :class:`~sptransform.page.folding.Segment`.
        module: the path within the segment's layers.
        kind, direction: as in :class:`~sptransform.engine.traffic.Collective`.
        count: the number of messages, in all layers of the segment.
        bytes_sent: of all of them.
    """

    segment: str
    module: str
    kind: str
    direction: str
    count: int
    bytes_sent: int


def sent(facts: Facts, segments: Sequence[Segment]) -> list[Sent]:
    """What ``facts.rank`` sends in a step. Parameter gradients are of no layer."""
    titles = {(key.prefix, key.index): segment.title for segment in segments for key in segment.keys if key.prefix}
    found: dict[tuple[str, str, str, str], list[int]] = defaultdict(lambda: [0, 0])
    for segment, module, collective in _places(facts, titles):
        entry = found[segment, module, collective.kind, collective.direction]
        entry[0] += collective.count
        entry[1] += collective.bytes_sent
    return [Sent(*place, *amounts) for place, amounts in found.items()]


def _places(facts: Facts, titles: dict[tuple[str, int], str]) -> Iterator[tuple[str, str, object]]:
    of_parameters = {redistribution.node for redistribution in facts.parameter_gradients}
    for collective in facts.collectives:
        layer = layer_of(collective.layer)
        if collective.node in of_parameters:
            yield "parameter gradients", "", collective
        elif layer is None or layer not in titles:
            yield "outside of layers", collective.layer, collective
        else:
            yield titles[layer], inside(collective.layer), collective
