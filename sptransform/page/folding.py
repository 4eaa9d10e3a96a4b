"""Equal layers once: the lines of a graph by numbered layer, and which layers are alike in every graph that is shown.

A layer is the first number in a module's path: ``model.layers.0.self_attn`` is of layer 0 of ``model.layers``. Two
layers are alike if their lines differ in nothing but names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from sptransform.cost.records import Step
from sptransform.graph.listing import Line

_NAME = re.compile(r"%([\w.]+)")


@dataclass(frozen=True, order=True)
class Key:
    """Which stretch of a model a line is of.

    Attributes:
        order: the number of kinds of layers that begin before it.
        prefix: ``model.layers``; "" outside of numbered layers.
        index: the layer's number; 0 outside.
    """

    order: int
    prefix: str
    index: int = 0


@dataclass(frozen=True)
class Segment:
    """Layers that are alike, or what stands before, between and after layers.

    Attributes:
        title: ``model.layers.0..31``, or ``before model.layers``.
        keys: what is drawn as one; the first one's lines are shown.
        times: how many layers that is; 1 outside of layers.
    """

    title: str
    keys: tuple[Key, ...]
    times: int = 1


def layer_of(path: str) -> tuple[str, int] | None:
    """``("model.layers", 3)`` of ``model.layers.3.mlp``; None of a path without a number."""
    parts = path.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if at is None else (".".join(parts[:at]), int(parts[at]))


def inside(path: str) -> str:
    """The path within its layer: ``self_attn.q_proj`` of ``model.layers.3.self_attn.q_proj``."""
    found = layer_of(path)
    return path if found is None else path.removeprefix(f"{found[0]}.{found[1]}".lstrip(".")).lstrip(".")


def by_layer(lines: Sequence[Line]) -> dict[Key, list[Line]]:
    """The lines of each layer, and of what is between layers, in the graph's order."""
    found: dict[Key, list[Line]] = {}
    prefixes: list[str] = []
    for line in lines:
        layer = layer_of(line.layer)
        if layer is None:
            key = Key(len(prefixes) * 2, "")
        else:
            prefix, index = layer
            if prefix not in prefixes:
                prefixes.append(prefix)
            key = Key(prefixes.index(prefix) * 2 + 1, prefix, index)
        found.setdefault(key, []).append(line)
    return found


def copies_of(step: Step) -> dict[tuple[str, int], int]:
    """How many equal layers of the model each numbered layer of the step stands for."""
    found = ((layer_of(work.layer), work.copies) for work in step.works)
    return {layer: copies for layer, copies in found if layer is not None and copies > 1}


def segments(
    graphs: Sequence[Mapping[Key, Sequence[Line]]], copies: Mapping[tuple[str, int], int] = MappingProxyType({})
) -> list[Segment]:
    """Neighbouring layers that are alike in each of ``graphs`` as one segment; all else by itself.

    ``copies`` are of graphs of few layers, see :func:`copies_of`.
    """
    keys = sorted({key for graph in graphs for key in graph})
    prefixes = [key.prefix for key in keys if key.prefix]
    groups: list[tuple[object, list[Key]]] = []
    for key in keys:
        form = (key.prefix, [_form(key, graph.get(key, ())) for graph in graphs]) if key.prefix else key
        if groups and groups[-1][0] == form:
            groups[-1][1].append(key)
        else:
            groups.append((form, [key]))
    return [_segment(tuple(group), prefixes, copies) for _, group in groups]


def _segment(keys: tuple[Key, ...], prefixes: Sequence[str], copies: Mapping[tuple[str, int], int]) -> Segment:
    first = keys[0]
    if first.prefix:
        stands_for = [copies.get((key.prefix, key.index), 1) for key in keys]
        numbers = _numbers(keys, copies)
        return Segment(f"{first.prefix}.{numbers}".lstrip("."), keys, sum(stands_for))
    names = list(dict.fromkeys(prefixes))
    following, before = names[first.order // 2 :][:1], names[: first.order // 2][-1:]
    title = f"before {following[0]}" if following else f"after {before[0]}" if before else "the model"
    return Segment(title.strip(), keys)


def _numbers(keys: tuple[Key, ...], copies: Mapping[tuple[str, int], int]) -> str:
    """``0..31``, or ``2,4..30`` of a kind of layers that alternates with others.

    A layer that stands for several is the first of them. Where p kinds alternate, p neighbours stand for others, and
    each for every p-th layer after it.
    """
    first, last = keys[0], keys[-1]
    kinds = [last.index]
    for step in (-1, 1):
        while (last.prefix, kinds[-1] + step) in copies:
            kinds.append(kinds[-1] + step)
        kinds.reverse()
    end = last.index + len(kinds) * (copies.get((last.prefix, last.index), 1) - 1)
    if end == first.index:
        return str(end)
    second = f",{first.index + len(kinds)}" if len(kinds) > 1 and first == last else ""
    return f"{first.index}{second}..{end}"


def _form(key: Key, lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """The lines without names: nodes are numbered as they come, parameters are named within their layer."""
    numbers: dict[str, str] = {}

    def form(name: str) -> str:
        own = layer_of(name)
        if own == (key.prefix, key.index):
            return inside(name)
        return numbers.setdefault(name, str(len(numbers)))

    def call(line: Line) -> str:
        return "" if line.kind == "constant" else _NAME.sub(lambda match: "%" + form(match[1]), line.call)

    return [(form(line.name), inside(line.layer), line.type, call(line)) for line in lines]


def within_layer(line: Line) -> Line:
    """The line with its layer's own parameters named within the layer."""
    own = layer_of(line.layer)

    def named(match: re.Match[str]) -> str:
        return "%" + (inside(match[1]) if own is not None and layer_of(match[1]) == own else match[1])

    return replace(line, call=_NAME.sub(named, line.call))
