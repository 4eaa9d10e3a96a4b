"""One self-contained HTML file: templates filled with what a page says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from math import prod
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from sptransform.page import values
from sptransform.page.content import Content, content
from sptransform.page.sliders import stops
from sptransform.page.traffic import DIRECTIONS, KINDS
from sptransform.planning.records import Option


def write_page(path: str | Path, options: Sequence[Option], *, title: str, hardware: str | None = None) -> None:
    """Write :func:`page` to a file."""
    Path(path).write_text(page(options, title=title, hardware=hardware), encoding="utf-8")


def page(options: Sequence[Option], *, title: str, hardware: str | None = None) -> str:
    """The page of one option, or of several side by side.

    Args:
        options: what is shown, in the order of its columns.
        title: its heading.
        hardware: the name of the hardware whose times are simulated; None if none is.
    """
    found = content(options, hardware)
    environment = Environment(
        loader=PackageLoader("sptransform.page", "templates"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: getattr(values, name) for name in ("count", "flops", "seconds", "share")}
    environment.filters["bytes"] = values.num_bytes
    timelines = [option.timeline for option in options if option.timeline is not None]
    return environment.get_template("page.html.j2").render(
        title=title,
        facts=_facts(options, hardware),
        hardware=hardware,
        content=found,
        rows=_rows(found),
        longest=max((timeline.seconds for timeline in timelines), default=0.0),
        has_time=bool(timelines),
        has_events=any(each["events"] for each in found.data["options"]),
        has_memory=any(curve is not None for curve in found.curves),
        has_two_dims=any(map(_has_two_dims, options)),
        has_rings=bool(found.data["rings"]),
        has_formulas=bool(found.data["sliders"]["names"] or found.data["machines"]),
        hardwares=tuple(found.data["machines"]),
        meanings=values.MEANINGS,
        made=f"Made by sptransform {version('sptransform')} with torch {torch.__version__}",
        script=_text("page.js"),
        style=_text("page.css"),
        data=_json(found.data),
    )


def _has_two_dims(option: Option) -> bool:
    """Whether its graph is cut one mesh dim after the other, as that of USP is on a mesh of one dim too."""
    return option.explanation is not None and len(option.explanation.rewritten.context.result.mesh_dims) > 1


def _text(name: str) -> str:
    """A style sheet or script without indentation and without lines that are comments."""
    lines = (files("sptransform.page") / "templates" / name).read_text(encoding="utf-8").splitlines()
    return "\n".join(line.strip() for line in lines if not line.strip().startswith("//"))


def _json(data: dict[str, Any]) -> str:
    """For a script element: no text in it can end the element."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c")


def _facts(options: Sequence[Option], hardware: str | None) -> str:
    """One line of what all options have in common."""
    num_ranks = max(prod(option.mesh) for option in options)
    at = stops(options)["at"]
    facts = [f"{num_ranks} ranks", *([f"{at['B']} × {at['S']:,} tokens"] if "S" in at else [])]
    sizes = [option.step.parameters for option in options if option.step is not None]
    if sizes:
        up_to = "up to " if min(sizes) < max(sizes) else ""
        facts.append(f"{up_to}{values.num_bytes(max(sizes)).text} of parameters on a rank")
    return " · ".join([*facts, *([hardware] if hardware else [])])


def _rows(found: Content) -> list[dict[str, Any]]:
    """What the table says of each option."""
    every = [_row(found, at) for at in range(len(found.options))]
    most = max((row[direction] for row in every for direction in DIRECTIONS if direction in row), default=0)
    for row in every:
        row["bars"] = {
            direction: [(kind, round(100 * size / most, 2)) for kind, size in row["kinds"][direction] if size]
            for direction in DIRECTIONS
            if "kinds" in row
        }
    return every


def _row(found: Content, at: int) -> dict[str, Any]:
    option, sent = found.options[at], found.sent[at]
    row: dict[str, Any] = {"option": option, "number": at}
    if option.blocked is not None:
        return row
    row["kinds"] = {}
    row["peak"] = option.peak_bytes
    for direction in DIRECTIONS:
        own = [each for each in sent if each.direction == direction]
        row[direction] = sum(each.bytes_sent for each in own)
        row[f"{direction}_messages"] = sum(each.count for each in own)
        row["kinds"][direction] = [(kind, sum(x.bytes_sent for x in own if x.kind == kind)) for kind in KINDS]
    return row
