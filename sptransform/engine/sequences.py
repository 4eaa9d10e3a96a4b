"""What says which dimension is a sequence, where neither attention nor an input does; the strongest evidence first.

A choice that is not the best costs communication, never exactness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx

from sptransform.graph import dataflow, notes
from sptransform.rules.rule import OpRule

EVIDENCE: tuple[Callable[[OpRule], Iterable[str]], ...] = (
    lambda rule: rule.ordered,  # a scan, a cumulative sum, a convolution along one dimension
    lambda rule: rule.windowed,  # rows of an image
    lambda rule: rule.looked_up,  # tokens
)


def strongest_evidence(graph: fx.Graph, light: frozenset[fx.Node]) -> list[tuple[fx.Node, str]]:
    """The factors of nodes that are sequences by the strongest kind of evidence of which the graph has any."""
    kinds = (_factors(graph, light, kind) for kind in EVIDENCE)
    return next(filter(None, kinds), [])


def ordered_factors(graph: fx.Graph, light: frozenset[fx.Node]) -> list[tuple[fx.Node, str]]:
    """The factors that ops run along."""
    return _factors(graph, light, EVIDENCE[0])


def _factors(
    graph: fx.Graph, light: frozenset[fx.Node], kind: Callable[[OpRule], Iterable[str]]
) -> list[tuple[fx.Node, str]]:
    """Those of ops that do more than what every rank does for itself, or count."""
    found = []
    for node in graph.nodes:
        rule = notes.note(node).rule
        if rule is not None and node not in light and dataflow.values(node)[0].is_floating_point():
            found.extend((node, name) for name in sorted(kind(rule)))
    return found
