"""An Explanation as a page: its sections, and the two ways to show them, plain text and rich."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sptransform.diagnostics.provenance import without_folders
from sptransform.inspection.attended_work import imbalance
from sptransform.inspection.records import Facts, Redistribution, RingPass

Row = tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """A titled table, or sentences; columns named in ``numbers`` are aligned right."""

    title: str
    columns: Row = ()
    rows: Sequence[Row] = ()
    sentences: Sequence[str] = ()
    numbers: frozenset[str] = frozenset(
        {"bytes back", "bytes each", "bytes sent", "count", "hops", "hops back", "over the mean", "pairs", "parameters"}
        | {"tokens", "classes", "of a chunk", "its bytes"}
    )


# ---------------------------------------------------------------------------------------------------------------
# What a page says.


def sections(facts: Facts) -> list[Section]:
    """Everything worth a reader's time, most important first; sections with nothing to say are left out."""
    if facts.world_size == 1:
        return [
            Section(f"{facts.strategy} on 1 rank", sentences=["Nothing is inserted: the model runs as it is."])
        ]
    found = [
        _totals(facts),
        _work(facts),
        _redistributions(facts),
        _rings(facts),
        *_expanded(facts),
        _parameter_gradients(facts),
        _losses(facts),
        _fallbacks(facts),
        _gathered(facts),
        _outputs(facts),
    ]
    return [section for section in found if section.rows or section.sentences]


def _totals(facts: Facts) -> Section:
    rows = [(t.direction, t.kind, str(t.count), f"{t.bytes_sent:,}") for t in facts.totals]
    for direction in ("forward", "backward"):
        count = sum(t.count for t in facts.totals if t.direction == direction)
        rows.append((direction, "in all", str(count), f"{facts.bytes_sent(direction):,}"))
    rows.sort(key=lambda row: row[0] != "forward")
    note = "All-reduces of n bytes count as 2(N-1)/N n."
    return Section(
        f"{facts.strategy} on {facts.world_size} ranks: "
        f"what rank {facts.rank} sends in one training step",
        ("direction", "collective", "count", "bytes sent"),
        rows,
        [*[note] * any(t.kind == "all_reduce" for t in facts.totals), *[facts.reason] * bool(facts.reason)],
    )


def _work(facts: Facts) -> Section:
    """A line for all ranks of equal work, in the order of the first of them."""
    pairs = facts.attended_pairs
    mean = sum(pairs) / max(len(pairs), 1)
    alike: dict[int, list[int]] = {}
    for rank, count in enumerate(pairs):
        alike.setdefault(count, []).append(rank)
    rows: list[Row] = [
        (ranks_text(ranks), f"{count:,}", f"{count / mean - 1:+.1%}" if mean else "") for count, ranks in alike.items()
    ]
    sentences = [f"The busiest rank has {imbalance(pairs):.1%} more than the mean."] if len(rows) > 1 else []
    if any(work.is_bound for work in facts.attention):
        sentences.append("Masks that depend on data may hide some of them.")
    packed = "" if facts.documents is None else " of packed documents"
    title = f"Attention{packed}: pairs of query and key in the forward, over heads and rows"
    return Section(title, ("rank", "pairs", "over the mean"), rows, sentences)


def ranks_text(ranks: Sequence[int]) -> str:
    """Ranks in ascending order, short: ``0..31``, ``0, 2 .. 62`` for every second one, ``0..3, 8..11``."""
    steps = {after - before for before, after in pairwise(ranks)}
    if len(ranks) > 2 and len(steps) == 1 and steps != {1}:
        return f"{ranks[0]}, {ranks[1]} .. {ranks[-1]}"
    starts = [i for i, rank in enumerate(ranks) if i == 0 or rank != ranks[i - 1] + 1]
    runs = [ranks[start:stop] for start, stop in pairwise([*starts, len(ranks)])]
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs]
    if len(texts) > 4:
        texts = [*texts[:2], f".. {texts[-1]} ({len(ranks)} ranks)"]
    return ", ".join(texts).replace(", ..", " ..")


def _redistributions(facts: Facts) -> Section:
    shown = [r for r in facts.redistributions if not r.parameters]
    sending = [r for r in shown if r.forward is not None or r.backward is not None]
    num_local = len(shown) - len(sending)
    columns = ("module", "count", "from -> to", "forward", "bytes each", "backward", "bytes each", "read by")
    rows = [
        (path or "(model)", str(count), r.change, *_cells(r), _short(r.source_line))
        for path, count, r in _alike(sending)
    ]
    note = f"{num_local} more send nothing: each rank slices what it holds." if num_local else ""
    return Section("Redistributions", columns, rows, [note] if note else [])


def _cells(r: Redistribution) -> Row:
    cells: list[str] = []
    for collectives in ([r.forward], [r.again, r.backward]):
        sent = [collective for collective in collectives if collective is not None]
        num_bytes = sum(collective.bytes_sent for collective in sent)
        cells += (" + ".join(c.kind for c in sent), f"{num_bytes:,}") if sent else ("-", "")
    return tuple(cells)


def _rings(facts: Facts) -> Section:
    groups: dict[tuple[object, ...], list[RingPass]] = {}
    for ring in facts.rings:
        cells = [(str(c.count), f"{c.bytes_sent:,}") if c else ("-", "") for c in (ring.forward, ring.backward)]
        key = (re.sub(r"\d+", "#", ring.layer), *cells[0], *cells[1], ring.kernel, ring.source_line)
        groups.setdefault(key, []).append(ring)
    columns = ("module", "count", "hops", "bytes sent", "hops back", "bytes back", "kernel", "line")
    rows = [
        (_joined([r.layer for r in group]), str(len(group)), *key[1:-1], _short(key[-1]))
        for key, group in groups.items()
    ]
    return Section("Ring attention: keys and values go round the ranks", columns, rows)


def _losses(facts: Facts) -> Section:
    columns = ("module", "tokens", "of a chunk", "classes", "its bytes", "line")
    rows = [
        (
            loss.layer or "(model)",
            loss.tokens,
            str(loss.chunk),
            loss.classes,
            "" if loss.chunk_bytes is None else f"{loss.chunk_bytes:,}",
            _short(loss.source_line),
        )
        for loss in facts.losses
    ]
    return Section("Logits of losses, for a chunk of tokens at a time, and again in the backward", columns, rows)


def _alike(redistributions: Iterable[Redistribution]) -> list[tuple[str, int, Redistribution]]:
    """Merge equal redistributions of numbered layers: (``layers.0..31.attention``, how many, one of them)."""
    groups: dict[tuple[object, ...], list[Redistribution]] = {}
    for r in redistributions:
        pattern = re.sub(r"\d+", "#", r.layer)
        groups.setdefault((pattern, r.changes, _cells(r), r.source_line), []).append(r)
    return [(_joined([r.layer for r in group]), len(group), group[0]) for group in groups.values()]


def _joined(paths: list[str]) -> str:
    """``a.0..2.b`` for ``a.0.b, a.1.b, a.2.b``: each number that varies as a range, gaps not shown."""
    numbers = zip(*([int(n) for n in re.findall(r"\d+", path)] for path in paths), strict=True)
    ranges = iter([str(min(n)) if min(n) == max(n) else f"{min(n)}..{max(n)}" for n in numbers])
    return re.sub(r"\d+", lambda _: next(ranges), paths[0])


def _expanded(facts: Facts) -> Iterable[Section]:
    """The steps of each kind of ring once, since layers differ only in their tensors."""
    shown: set[str] = set()
    for ring in facts.expanded:
        pattern = re.sub(r"\d+", "#", ring.layer)
        if pattern not in shown:
            shown.add(pattern)
            for direction, steps in (("forward", ring.forward), ("backward", ring.backward)):
                title = f"{ring.node} in {ring.layer or '(model)'}, {direction} on rank {facts.rank}"
                yield Section(title, sentences=steps)


def _parameter_gradients(facts: Facts) -> Section:
    if not facts.grad_sync:
        return Section(
            "Parameter gradients", sentences=["Not summed over the ranks (grad_sync=False): .grad is one rank's term."]
        )
    groups: dict[tuple[object, ...], list[Redistribution]] = {}
    for r in facts.parameter_gradients:
        if r.backward is not None:
            names = tuple(re.sub(r"\d+", "#", name) for name in r.parameters)
            groups.setdefault((names, r.backward.kind, r.backward.bytes_sent), []).append(r)
    rows = [
        (str(len(group)), kind, f"{sent:,}", str(len(names)), _few([_joined(list(p)) for p in _by_position(group)]))
        for (names, kind, sent), group in groups.items()
    ]
    return Section(
        "Parameter gradients, summed over the ranks in the backward",
        ("count", "collective", "bytes each", "parameters", "of"),
        rows,
    )


def _by_position(buckets: list[Redistribution]) -> Iterable[tuple[str, ...]]:
    return zip(*(bucket.parameters for bucket in buckets), strict=True)


def _few(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"


def _fallbacks(facts: Facts) -> Section:
    rows = [(f.op, f"{f.gathered_bytes:,}", _short(f.source)) for f in facts.fallbacks]
    title = "Fallbacks: ops without a sharding rule, run whole on every rank"
    return Section(title, ("count", "op", "bytes each", "line"), _counted(rows))


def _gathered(facts: Facts) -> Section:
    rows = [(g.op, f"{g.gathered_bytes:,}", _short(g.source_line)) for g in facts.gathered]
    title = "Gathered: tensors made whole for an op that cannot run on shards"
    return Section(title, ("count", "read by", "bytes each", "line"), _counted(rows))


_MEANINGS = {"I": "whole on every rank", "R": "whole on every rank", "S": "this rank's part"}


def _outputs(facts: Facts) -> Section:
    rows = [(o.type, o.placement, _MEANINGS.get(o.placement[0], "")) for o in facts.outputs]
    return Section("Outputs", ("count", "type", "placement", "meaning"), _counted(rows))


def _counted(rows: Iterable[Row]) -> list[Row]:
    """Equal rows merged, with their count in front."""
    return [(str(count), *row) for row, count in Counter(rows).items()]


def _short(source_line: str | None) -> str:
    return "" if source_line is None else without_folders(source_line)


# ---------------------------------------------------------------------------------------------------------------
# Two ways to show it.


def plain(page: Iterable[Section]) -> str:
    """The sections as text, columns aligned by spaces."""
    return "\n\n".join("\n".join(_lines(section)) for section in page)


def _lines(section: Section) -> Iterable[str]:
    yield section.title
    console = Console()
    unbounded = console.options.update(width=sys.maxsize)  # nothing folds
    for line in console.render_lines(_body(section), unbounded, pad=False):
        yield f"  {''.join(segment.text for segment in line)}".rstrip()


def rich(page: Iterable[Section]) -> RenderableType:
    """The sections as rich tables in panels."""
    return Group(*(Panel(_body(section), title=Text(section.title), title_align="left") for section in page))


def _body(section: Section) -> RenderableType:
    sentences = [Text(sentence) for sentence in section.sentences]
    if not section.rows:
        return Group(*sentences)
    table = Table(box=None, pad_edge=False)
    for name in section.columns:
        # where the terminal is narrow, names and source lines fold, numbers do not
        folds = name in (section.columns[-1], "module")
        align = "right" if name in section.numbers else "left"
        table.add_column(name, justify=align, overflow="fold", no_wrap=not folds)
    for row in section.rows:
        table.add_row(*map(Text, row))  # a Text, since source lines hold brackets, which rich would read as markup
    return Group(table, *sentences)
