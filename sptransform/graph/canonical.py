"""One order and one set of names for graphs that compute the same, however Python happened to order what they read.

A model that goes over a set of strings makes its rotary tables in another order in every process. What trains, what
draws random numbers or writes, and what communicates keeps its place; everything else comes when it is first needed.
"""

from __future__ import annotations

import re
from collections import Counter

import torch
from torch import fx

from sptransform.graph import notes


def in_canonical_order(graph: fx.Graph) -> list[fx.Node]:
    """Inputs in the order in which they are first needed, parameters last; then the nodes, operands first."""
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if _keeps_its_place(node):
            _add(node, found)
    unneeded = [node for node in graph.find_nodes(op="placeholder") if node not in found]
    found |= dict.fromkeys(sorted(unneeded, key=lambda node: node.name))
    inputs = [node for node in found if node.op == "placeholder"]
    inputs.sort(key=lambda node: notes.note(node).is_parameter)
    return [*inputs, *(node for node in found if node.op != "placeholder")]


def canonical_names(graph: fx.Graph) -> dict[fx.Node, str]:
    """A name for each node, numbered in canonical order; inputs keep theirs."""
    counts: Counter[str] = Counter()
    found = {}
    for node in in_canonical_order(graph):
        if node.op == "placeholder":
            found[node] = node.name
            continue
        stem = re.sub(r"_\d+$", "", node.name)
        found[node] = f"{stem}_{counts[stem]}" if counts[stem] else stem
        counts[stem] += 1
    return found


def _keeps_its_place(node: fx.Node) -> bool:
    note = notes.note(node)
    if node.op == "output" or note.differentiable or note.mesh is not None or node.is_impure():
        return node.op != "placeholder"
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _add(node: fx.Node, found: dict[fx.Node, None]) -> None:
    stack = [node]
    while stack:
        missing = [x for x in stack[-1].all_input_nodes if x not in found]
        if missing:
            stack.extend(reversed(missing))
        else:
            found.setdefault(stack.pop())
