"""The graphs of a page as data: every text once, every line once, and lists of their numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sptransform.graph.listing import Line
from sptransform.inspection.records import Facts
from sptransform.page.folding import Key, inside, within_layer

LONGEST = 220
_PACKAGE = re.compile(r"^\S*/(?:site|dist)-packages/")


class Pool:
    """Gives equal things one number, in order of their first use."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self._numbers: dict[Any, int] = {}

    def number(self, item: Any) -> int:
        if item not in self._numbers:
            self._numbers[item] = len(self.items)
            self.items.append(item)
        return self._numbers[item]


class Lines:
    """Lines of all graphs of a page.

    Attributes:
        texts: every text.
        lines: ``(name, type, call, module, source line, kind, sent)``, each a number in ``texts``; of ``sent``, -1 is
            nothing.
        places: ``(op, module, source line)`` of what runs, numbers in ``texts`` too.
    """

    def __init__(self) -> None:
        self.texts, self.lines, self.places = Pool(), Pool(), Pool()

    def numbers(self, lines: Iterable[Line], sent: Mapping[str, str]) -> list[int]:
        """The numbers of these lines, without those of parameters."""
        return [self._number(within_layer(line), sent.get(line.name)) for line in lines if line.parameter is None]

    def place(self, op: str, layer: str, source_line: str | None) -> int:
        """The number of a place."""
        return self.places.number(tuple(map(self.texts.number, (op, layer, source(source_line)))))

    def _number(self, line: Line, sent: str | None) -> int:
        cells = (line.name, shortened(line.type), shortened(line.call), inside(line.layer), source(line.source_line))
        text = self.texts.number
        return self.lines.number((*map(text, cells), text(line.kind), -1 if sent is None else text(sent)))


def shortened(text: str) -> str:
    """The text without the middle of a long list."""
    if len(text) <= LONGEST:
        return text
    parts = text.split(", ")
    if len(parts) < 4:
        return f"{text[: LONGEST - 1]}…"
    return shortened(f"{parts[0]}, {parts[1]}, … {len(parts) - 3} more …, {parts[-1]}")


def source(line: str | None) -> str:
    """``transformers/models/..py:182: code`` of a line in an installed package."""
    return "" if line is None else _PACKAGE.sub("", line)


def sent_by_node(facts: Facts, text: Any) -> dict[str, str]:
    """``all_to_all|268 MB|268 MB`` for each node that sends: kind, forward, backward; "" is nothing."""
    found: dict[str, dict[str, Any]] = {}
    for collective in facts.collectives:
        entry = found.setdefault(collective.node, {"kind": collective.kind, "forward": 0, "backward": 0})
        entry[collective.direction] += collective.bytes_sent
        if collective.direction == "forward":
            entry["kind"] = collective.kind
    shown = {
        node: (e["kind"], *(text(e[d]) if e[d] else "" for d in ("forward", "backward"))) for node, e in found.items()
    }
    return {node: "|".join(cells) for node, cells in shown.items()}


def shown_lines(graph: Mapping[Key, Sequence[Line]], keys: Sequence[Key]) -> Sequence[Line]:
    """Of equal layers, the first one's."""
    return graph.get(keys[0], ())
