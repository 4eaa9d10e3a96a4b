"""All that a page says of the options it compares, as plain data for its templates and its script."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Any

from sptransform.graph import notes
from sptransform.graph.listing import Line, listing
from sptransform.page import memory, values
from sptransform.page.folding import Key, Segment, by_layer, copies_of, segments
from sptransform.page.graphs import Lines, Pool, sent_by_node, shown_lines, source
from sptransform.page.machines import on_machines
from sptransform.page.placed import placed
from sptransform.page.rings import RingShape, lanes, rings_of
from sptransform.page.sliders import sliders
from sptransform.page.step_times import step_times
from sptransform.page.streams import lane_events
from sptransform.page.traffic import DIRECTIONS, KINDS, Sent, sent
from sptransform.planning.records import Option
from sptransform.planning.units import size

# ranks of which the parts of tensors are drawn
DRAWN = 8
DIGITS = string.digits + string.ascii_lowercase


@dataclass(frozen=True)
class Content:
    """What the templates read.

    Attributes:
        options: the options, as given.
        segments: layers that are alike in all of them, as one.
        sent: of each option, what it sends.
        curves: of each option, memory over the step; None where it is blocked.
        data: what the script reads, for ``json.dumps``.
    """

    options: tuple[Option, ...]
    segments: tuple[Segment, ...]
    sent: tuple[tuple[Sent, ...], ...]
    curves: tuple[memory.Curve | None, ...]
    data: dict[str, Any]


def content(options: Sequence[Option], hardware: str | None = None) -> Content:
    """What the page says of ``options``; ``hardware`` is the name of what their times are simulated for."""
    before, graphs = _graphs(options)
    steps = [option.step for option in options if option.step is not None]
    found = segments([before, *(graph for graph in graphs if graph)], copies_of(steps[0]) if steps else {})
    lines = Lines()
    shapes: dict[RingShape, int] = {}
    boxes = Pool()
    sending = tuple(tuple(sent(o.step, o.explanation, found)) if o.step else () for o in options)
    curves = tuple(memory.curve(option.step) if option.step else None for option in options)
    data = {
        "kinds": KINDS,
        "segments": [_segment(each, before, lines) for each in found],
        "options": [
            {
                "name": option.name,
                "blocked": option.blocked is not None,
                "graph": _graph(option, graph, found, lines),
                "placed": _placed(option, boxes),
                "rings": _rings(option, shapes),
                "memory": _memory(curve, lines),
                "where": _where(cells, found, lines.texts.number),
                "events": lane_events(option, found, lines),
            }
            for option, graph, curve, cells in zip(options, graphs, curves, sending, strict=True)
        ],
        "rings": [_lanes(shape) for shape in shapes],
        "sliders": sliders(options),
        "times": step_times(options, hardware),
        "machines": on_machines(options, hardware),
        "limit": next((int(o.timeline.memory_bytes) for o in options if o.timeline and o.timeline.memory_bytes), None),
    }
    data |= {"texts": lines.texts.items, "lines": lines.lines.items, "places": lines.places.items, "boxes": boxes.items}
    return Content(tuple(options), tuple(found), sending, curves, data)


def _graphs(options: Sequence[Option]) -> tuple[dict[Key, list[Line]], list[dict[Key, list[Line]]]]:
    """The captured graph, which is the same for all, and each rewritten one, by layer."""
    explained = [option.explanation for option in options if option.explanation is not None]
    before = next((e.rewritten.before for e in explained if e.rewritten.before), ())
    graphs = [
        by_layer(listing(option.explanation.rewritten.graph_module.graph.nodes, is_local=True))
        if option.explanation
        else {}
        for option in options
    ]
    return by_layer(before), graphs


def _segment(segment: Segment, before: dict[Key, list[Line]], lines: Lines) -> dict[str, Any]:
    own = lines.numbers(shown_lines(before, segment.keys), {})
    return {"title": segment.title, "times": segment.times, "before": own}


def _graph(option: Option, graph: dict[Key, list[Line]], found: Sequence[Segment], lines: Lines) -> list[list[int]]:
    if option.explanation is None:
        return []
    sending = sent_by_node(option.explanation, size)
    return [lines.numbers(shown_lines(graph, segment.keys), sending) for segment in found]


def drawn_ranks(num_ranks: int) -> tuple[int, ...]:
    """All of a few ranks; of many, the first ones and the last two."""
    if num_ranks <= DRAWN:
        return tuple(range(num_ranks))
    return (*range(DRAWN - 2), num_ranks - 2, num_ranks - 1)


def _placed(option: Option, boxes: Pool) -> list[dict[str, Any]]:
    """The tensors of the first attention."""
    if option.explanation is None:
        return []
    rewritten = option.explanation.rewritten
    node = next((node for node in rewritten.graph_module.graph.nodes if notes.decided(node)), None)
    if node is None:
        return []
    return [
        {
            "name": each.name,
            "place": each.place,
            "shape": each.shape,
            "placements": " ".join(each.placements),
            "ranks": each.ranks,
            "boxes": boxes.number(each.boxes),
        }
        for each in placed(rewritten, node, drawn_ranks(prod(option.mesh)))
    ]


def _rings(option: Option, shapes: dict[RingShape, int]) -> list[dict[str, Any]]:
    """The kinds of rings, each with the number of its lanes and what has it."""
    found: dict[tuple[int, str | None], int] = {}
    for _, shape in rings_of(option.explanation.rewritten) if option.explanation else ():
        number = shapes.setdefault(_of_any_layout(shape), len(shapes))
        found[number, shape.layout] = found.get((number, shape.layout), 0) + 1
    return [{"lanes": number, "layout": layout, "count": count} for (number, layout), count in found.items()]


def _of_any_layout(shape: RingShape) -> RingShape:
    return RingShape(shape.num_ranks, shape.queries, shape.keys, shape.nearest, shape.farthest, None)


def _lanes(shape: RingShape) -> dict[str, Any]:
    """Pairs of a rank at each step as shares of the largest block of any layout, equal steps as one; sums in full."""
    found = lanes(shape)
    largest = max(pairs for rows in found.values() for row in rows for pairs in row)
    return {
        "ranks": shape.num_ranks,
        "queries": shape.queries,
        "largest": largest,
        "layouts": {
            name: [_runs([_two_digits(pairs / largest) for pairs in row]) for row in rows]
            for name, rows in found.items()
        },
        "sums": {name: [sum(row) for row in rows] for name, rows in found.items()},
        "slowest": {name: sum(map(max, zip(*rows, strict=True))) for name, rows in found.items()},
    }


def _runs(items: Sequence[str]) -> str:
    """``ab3 cd`` for ab, ab, ab, cd: equal neighbours once, with their number."""
    runs = [(item, len(list(same))) for item, same in groupby(items)]
    return " ".join(item if times == 1 else f"{item}{times}" for item, times in runs)


def _two_digits(share: float) -> str:
    """A number from 0 to 1 as two digits to the base 36, of 1295 at most."""
    return "".join(DIGITS[digit] for digit in divmod(round(1295 * share), 36))


def _memory(curve: memory.Curve | None, lines: Lines) -> dict[str, Any] | None:
    """Points in thousandths of the peak, and what runs at each."""
    if curve is None or not curve.points:
        return None
    peak, place = max(curve.points), lines.place
    return {
        "peak": peak,
        "floor": curve.floor,
        "backward": curve.backward,
        "spikes": [_spike(spike) for spike in curve.spikes],
        "points": [round(1000 * point / peak) for point in curve.points],
        "works": [place(work.op, work.layer, work.source_line) for work in curve.works],
    }


def _spike(spike: memory.Spike) -> dict[str, Any]:
    held = values.num_bytes(spike.live)
    line = source(spike.work.source_line)
    return {"point": spike.point, "op": spike.work.op, "line": line, "text": held.text, "exact": held.exact}


def _where(cells: Iterable[Sent], found: Sequence[Segment], text: Callable[[str], int]) -> list[list[int]]:
    """What is sent: segment, -1 for none; module, a number of a text; kind; direction; messages; bytes."""
    titles = [segment.title for segment in found]
    return [
        [
            titles.index(each.segment) if each.segment else -1,
            text(each.module),
            KINDS.index(each.kind),
            DIRECTIONS.index(each.direction),
            each.count,
            each.bytes_sent,
        ]
        for each in cells
    ]
