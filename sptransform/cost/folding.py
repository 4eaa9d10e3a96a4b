"""Equal layers of a captured model: a few of them stay in the graph, and stand for the others.

Layers that one module list holds, and that do the same, are found in Dynamo's graph by what their nodes compute. Of a
run of equal layers the first, one of the middle and the last stay, since the first and the last may be rewritten
otherwise. Where kinds of layers alternate, so do the periods of which three stay.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from sptransform.diagnostics.provenance import module_path

_LONGEST_PERIOD = 8


@dataclass(frozen=True)
class LayerRun:
    """Equal layers that follow each other, or periods of layers, of which one is kept for several.

    Attributes:
        first: path of the first layer that is kept for others; no other run has it. "" of what stands for itself.
        times: how many the kept period stands for, itself included.
    """

    first: str = ""
    times: int = 1


_ITSELF = LayerRun()


@dataclass(frozen=True)
class Folded:
    """A graph of few layers.

    Attributes:
        graph_module: the graph.
        inputs: of those it was captured with, the ones it still reads.
        runs: paths of the layers that stand for others -> of which run.
    """

    graph_module: fx.GraphModule
    inputs: list[Any]
    runs: dict[str, LayerRun]


@dataclass
class _Layer:
    """One layer: its module's path, and its nodes, in order, without placeholders."""

    path: str
    nodes: list[fx.Node]


def fold_layers(gm: fx.GraphModule, inputs: Sequence[Any]) -> Folded:
    """A copy of Dynamo's ``gm`` in which equal layers that follow each other are few; without such, all of it."""
    gm = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    runs: dict[str, LayerRun] = {}
    for layers in _stacks(gm.graph):
        start = 0
        while start < len(layers):
            period, stop = _run(layers, start)
            repeats = (stop - start) // period
            if repeats > 3:
                middle = layers[start + period : start + 2 * period]
                runs |= {layer.path: LayerRun(middle[0].path, repeats - 2) for layer in middle}
                _cut(gm.graph, layers, start + 2 * period, start + (repeats - 1) * period, period)
                start += repeats * period
            else:
                start += 1
    placeholders = gm.graph.find_nodes(op="placeholder")
    kept = list(inputs)
    if runs:
        kept = [x for x, node in zip(inputs, placeholders, strict=True) if node.users]
        for node in placeholders:
            if not node.users:
                gm.graph.erase_node(node)
        gm.recompile()
    return Folded(gm, kept, runs)


def run_of(path: str, runs: Mapping[str, LayerRun]) -> LayerRun:
    """The equal layers that the module or parameter at ``path`` stands for."""
    return next((run for layer, run in runs.items() if path == layer or path.startswith(f"{layer}.")), _ITSELF)


def _stacks(graph: fx.Graph) -> list[list[_Layer]]:
    """The module lists of the graph whose layers run one after the other, each as its layers.

    A layer's nodes are those from its first to the next layer's first. The last layer has those in its module only.
    """
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    paths = [module_path(node) for node in nodes]
    firsts: dict[str, dict[int, int]] = {}
    last: dict[str, int] = {}
    for index, path in enumerate(paths):
        for match in re.finditer(r"\.(\d+)(?=\.|$)", path):
            prefix = path[: match.start()]
            firsts.setdefault(prefix, {}).setdefault(int(match[1]), index)
            last[prefix] = index
    found = []
    for prefix, begins in firsts.items():
        numbers = sorted(begins)
        bounds = [begins[number] for number in numbers]
        # a list inside of a layer that is repeated itself is left to that layer
        inside = any(prefix.startswith(f"{other}.") for other in firsts if other != prefix)
        if len(numbers) > 3 and bounds == sorted(bounds) and not inside:
            ends = [*bounds[1:], last[prefix] + 1]
            found.append(
                [
                    _Layer(f"{prefix}.{number}", nodes[lo:hi])
                    for number, lo, hi in zip(numbers, bounds, ends, strict=True)
                ]
            )
    return found


def _run(layers: list[_Layer], start: int) -> tuple[int, int]:
    """(period, stop) of the longest stretch from ``start`` on in which each layer is as the one a period before."""
    best = 1, start + 1
    for period in range(1, _LONGEST_PERIOD + 1):
        stop = start + period
        while stop < len(layers) and _are_alike(layers, stop - period, stop, start):
            stop += 1
        stop -= (stop - start) % period
        if (stop - start) // period > 3 and stop > best[1]:
            best = period, stop
    return best


def _are_alike(layers: list[_Layer], first: int, second: int, start: int) -> bool:
    """Whether two layers do the same with what comes from outside of them.

    From a layer before, both read what is at the same place of it. The first layer of a run may read anything there.
    """
    one, other = layers[first], layers[second]
    if len(one.nodes) != len(other.nodes):
        return False
    partner = dict(zip(one.nodes, other.nodes, strict=True))
    place = {node: (index, at) for index, layer in enumerate(layers) for at, node in enumerate(layer.nodes)}

    def fits(x: Any, y: Any) -> bool:
        if not isinstance(x, fx.Node) or not isinstance(y, fx.Node):
            return type(x) is type(y) and (x is y or _equal(x, y))
        if x in partner or x is y:
            return partner.get(x, x) is y
        if x.op == y.op == "placeholder":
            return _value(x) == _value(y)
        if x.op == y.op == "get_attr":
            return _attribute(x) == _attribute(y)
        if y in place and place[y][0] == second - 1 and _value(x) == _value(y):
            return first == start or (x in place and place[x] == (first - 1, place[y][1]))
        return False

    for a, b in zip(one.nodes, other.nodes, strict=True):
        x, y = _leaves(a), _leaves(b)
        if (a.op, a.target) != (b.op, b.target) or _value(a) != _value(b) or len(x) != len(y):
            return False
        if not all(fits(*pair) for pair in zip(x, y, strict=True)):
            return False
    return True


def _attribute(node: fx.Node) -> Any:
    """What tells the attributes of two nodes apart: of a body, such as a checkpointed one, what its nodes do."""
    held = node.graph.owning_module
    for name in str(node.target).split("."):
        held = getattr(held, name)
    return _program(held.graph) if isinstance(held, fx.GraphModule) else _value(node)


def _program(graph: fx.Graph) -> list[Any]:
    """A graph without names: what each node calls, on which earlier nodes and on what else, and what comes out."""
    number = {node: index for index, node in enumerate(graph.nodes)}
    return [
        (
            node.op,
            _attribute(node) if node.op == "get_attr" else node.op == "placeholder" or node.target,
            [("node", number[x]) if isinstance(x, fx.Node) else x for x in _leaves(node)],
            _value(node),
        )
        for node in graph.nodes
    ]


def _leaves(node: fx.Node) -> list[Any]:
    return pytree.tree_leaves((node.args, node.kwargs))


def _equal(x: Any, y: Any) -> bool:
    try:
        return bool(x == y)
    except (RuntimeError, ValueError):  # tensors, and what else has no one answer
        return False


def _value(node: fx.Node) -> Any:
    """What tells the results of two nodes apart: shapes, strides and dtypes."""
    leaves = pytree.tree_leaves(node.meta.get("example_value"))
    return [
        (x.shape, x.stride(), x.dtype, x.requires_grad, x.device) if isinstance(x, torch.Tensor) else x for x in leaves
    ]


def _cut(graph: fx.Graph, layers: list[_Layer], lo: int, hi: int, period: int) -> None:
    """Erase the layers ``lo .. hi - 1``: what reads them, as outputs do, reads one a whole number of periods before."""
    for layer in range(lo, hi):
        source = layers[lo - period + (layer - lo) % period]
        for gone, kept in zip(layers[layer].nodes, source.nodes, strict=True):
            gone.replace_all_uses_with(kept, delete_user_cb=lambda user: True)
    for layer in reversed(layers[lo:hi]):
        for node in reversed(layer.nodes):
            graph.erase_node(node)
