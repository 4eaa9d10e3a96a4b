"""What a rank is about to run, as lines that must be equal on all ranks, and where two ranks' lines first differ.

Three parts, in this order: versions and settings; the captured graph, which has global sizes only; the collective
schedule, one line per node with its full placements. No line depends on the rank, not even with uneven partitions. The
captured graph comes before the schedule because a difference in the graph is the cause of one in the schedule.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx
from torch.utils import _pytree as pytree

from sptransform.diagnostics import provenance
from sptransform.diagnostics.errors import describe
from sptransform.graph import dataflow, notes
from sptransform.graph.canonical import canonical_names
from sptransform.graph.printer import line
from sptransform.sharding.mesh import Mesh
from sptransform.sharding.sizes import size_of

# The parts of an argument's text that differ between processes: device index, object addresses.
_OWN = re.compile(r"(?<=\b(?:cuda|mtia)):\d+|(?<=\bxpu):\d+| at 0x[0-9a-f]+")

_SYMBOLIC = re.compile(r"^%\w+ : \w+\[[^\]]*\bk?_?s\d+[^\]]*\].* = input$")


@dataclass(frozen=True)
class Line:
    """One line of a program; ``source`` is the user's line it comes from, and is not compared."""

    text: str
    source: str | None = None


@dataclass(frozen=True)
class Program:
    """What one rank is about to run."""

    lines: tuple[Line, ...]

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256("\n".join(x.text for x in self.lines).encode()).hexdigest()[:32]

    def dumps(self) -> str:
        return json.dumps([[x.text, x.source] for x in self.lines])

    @staticmethod
    def loads(text: str | bytes) -> Program:
        return Program(tuple(Line(*pair) for pair in json.loads(text)))


def captured_lines(graph: fx.Graph) -> list[Line]:
    """Every node of the captured graph in canonical order, including tensor inputs with their global shapes.

    Inputs that are sizes are left out: whether a size is an input depends on the shapes this process has seen before.
    """
    names = canonical_names(graph)
    nodes = [node for node in names if node.op != "placeholder" or dataflow.is_tensor(node)]
    return [Line(_OWN.sub("", line(node, names=names)), provenance.source_line(node)) for node in nodes]


def lengths_at(graph: fx.Graph) -> list[tuple[int, int]]:
    """(input, dim) of every length the graph leaves open, each once. Ranks must agree on their values in every call."""
    found: dict[str, tuple[int, int]] = {}
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for index, node in sorted(enumerate(placeholders), key=lambda pair: pair[1].name):
        if dataflow.is_tensor(node):
            for dim, size in enumerate(dataflow.value(node).shape):
                if isinstance(size, torch.SymInt) and not isinstance(size_of(size), int):
                    found.setdefault(str(size), (index, dim))
    return list(found.values())


def schedule_lines(graph: fx.Graph, mesh: Mesh) -> list[Line]:
    """Every node that communicates over ``mesh``, in order, with the partitions its arguments spell out."""
    found, names = [], canonical_names(graph)
    for node in graph.nodes:
        if notes.note(node).mesh == mesh:
            # on a mesh of two dims, ranks are in different groups, which have different names
            texts = [x for x in pytree.tree_leaves(node.args) if isinstance(x, str) and x != mesh.group]
            text = line(node, names=names).replace(repr(mesh.group), "..")
            specs = f" # {', '.join(dict.fromkeys(texts))}" if texts else ""
            found.append(Line(text + specs, provenance.source_line(node)))
    return found


def placement_lines(graph: fx.Graph, mesh: Mesh) -> list[Line]:
    """The placements, on the mesh dim distributed last, of the nodes that communicate over ``mesh``.

    With uneven shares of the first mesh dim, each rank distributes the second on its own. Ranks may do so differently,
    but not where they communicate: a tensor that is R on one rank and P on another cannot be summed over them.
    """
    found, names = [], canonical_names(graph)
    for node in graph.nodes:
        if notes.note(node).mesh == mesh:
            placed = [_placed(x) for x in (*dataflow.operands(node), node)]
            text = f"%{names[node]} on the second mesh dim, after uneven shares of the first: {', '.join(placed)}"
            found.append(Line(text, provenance.source_line(node)))
    return found


def _placed(node: fx.Node) -> str:
    placements = notes.note(node).placements
    if dataflow.projection(node) is not None:
        placements = (notes.placement(node),)
    # without gradients R and I are the same
    kinds = [str(placement) for placement in placements or ()]
    return "".join(kinds if notes.note(node).differentiable else [kind.replace("R", "I") for kind in kinds])


def difference(programs: Mapping[int, Program], lengths: Mapping[int, Sequence[str]] | None = None) -> str:
    """The message that names the first line in which the ranks' programs differ, the same on every rank.

    ``lengths`` are the lengths in each rank's call, if its program serves several. If nothing else differs, the message
    names the first input with such a length.
    """
    lengths = lengths or {}
    by_rank = {rank: program.lines for rank, program in sorted(programs.items())}
    texts = {rank: [x.text for x in lines] for rank, lines in by_rank.items()}
    for rank, values in lengths.items():
        if values:
            at = next((i for i, text in enumerate(texts[rank]) if _SYMBOLIC.search(text)), 0)
            texts[rank][at] += f", now for {', '.join(values)}"
    num_lines = max(map(len, by_rank.values()))
    at = next(i for i in range(num_lines) if len({_text(lines, i) for lines in texts.values()}) > 1)
    ranks_of: dict[str, list[int]] = {}
    for rank, lines in texts.items():
        ranks_of.setdefault(_text(lines, at), []).append(rank)
    first = next(lines[at] for lines in by_rank.values() if at < len(lines))
    name = first.text.split(" ")[0].rstrip(":")
    return describe(
        "ranks are about to run different programs",
        at=name if name.startswith("%") else None,
        source=first.source,
        found=list_by_ranks(ranks_of),
        fix="call the same model on every rank, with inputs of the same shapes, the same strategy and options",
    )


def list_by_ranks(ranks_of: Mapping[str, Iterable[int]]) -> str:
    """``rank 0: this`` and, below it, ``ranks 1, 2: that``."""
    return "\n         ".join(f"{name_ranks(ranks)}: {text}" for text, ranks in ranks_of.items())


def name_ranks(ranks: Iterable[int]) -> str:
    """``rank 1`` or ``ranks 1, 3``."""
    ranks = sorted(ranks)
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _text(lines: Sequence[str], index: int) -> str:
    return lines[index] if index < len(lines) else "nothing more"
