"""Where the bytes go: what a rank sends, by kind of collective, direction and part of the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from sptransform.cost.records import Step
from sptransform.diagnostics import provenance
from sptransform.inspection.records import Facts
from sptransform.page.folding import Segment, inside, layer_of

KINDS = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce", "send_recv")
DIRECTIONS = ("forward", "backward")
GRADIENTS = "gradients of parameters"


@dataclass(frozen=True)
class Sent:
    """Messages of one kind in one direction from one place.

    Attributes:
        segment: the title of a :class:`~sptransform.page.folding.Segment`; "" outside of layers.
        module: the path within the segment's layers; outside of layers the whole path, or :data:`GRADIENTS`.
        kind, direction: as in :class:`~sptransform.cost.records.Work`.
        count: the number of messages, in all layers of the segment.
        bytes_sent: of all of them.
    """

    segment: str
    module: str
    kind: str
    direction: str
    count: int
    bytes_sent: int


def sent(step: Step, facts: Facts, segments: Sequence[Segment]) -> list[Sent]:
    """What a rank sends in ``step``; gradients of parameters, which are sent in buckets, are of no layer."""
    titles = {(key.prefix, key.index): segment.title for segment in segments for key in segment.keys if key.prefix}
    buckets = _buckets(facts)
    found: dict[tuple[str, str, str, str], list[int]] = defaultdict(lambda: [0, 0])
    for work in step.works:
        if work.kind != "message" or work.message is None:
            continue
        title = titles.get(layer_of(work.layer) or ("", 0), "")
        module = inside(work.layer) if title else work.layer
        if work.direction == "backward" and (work.layer, work.source_line, work.message.kind) in buckets:
            title, module = "", GRADIENTS
        entry = found[title, module, work.message.kind, work.direction]
        entry[0] += work.copies
        entry[1] += work.copies * work.message.bytes_sent
    return [Sent(*place, *amounts) for place, amounts in found.items()]


def _buckets(facts: Facts) -> set[tuple[str, str | None, str]]:
    """(module, source line, kind) of what sums gradients of parameters: a bucket has those of one of its readers."""
    kinds = {r.node: r.backward.kind for r in facts.parameter_gradients if r.backward is not None}
    nodes = facts.rewritten.graph_module.graph.nodes
    found = (node for node in nodes if node.name in kinds)
    return {(provenance.module_path(node), provenance.source_line(node), kinds[node.name]) for node in found}
