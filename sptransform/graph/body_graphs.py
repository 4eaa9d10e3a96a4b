"""The body of a custom autograd.Function as a graph: its forward, and behind that its backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sptransform.graph import dataflow, notes
from sptransform.graph.edit import compute_value
from sptransform.ops.body import Body, Step, Value

FUNCTION = torch.ops.sptransform.autograd_function.default
_BODY = 3  # its argument


@dataclass(frozen=True)
class BodyGraph:
    """A graph with the nodes of a :class:`Body`; ``operands`` and ``given`` are its placeholders."""

    graph: fx.Graph
    operands: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    given: tuple[fx.Node, ...]
    gradients: tuple[fx.Node | None, ...]

    def close(self) -> BodyGraph:
        """Let the graph return results and gradients, and drop what neither needs. Returns self."""
        self.graph.output((list(self.results), list(self.gradients)))
        for node in reversed(self.graph.nodes):
            if node.op == "call_function" and not node.users and not dataflow.writes(node):
                self.graph.erase_node(node)
        return self

    @property
    def body(self) -> Body:
        """What the graph computes."""
        results, gradients = self.graph.output_node().args[0]
        values: dict[fx.Node, Value] = {}
        forward: list[Step] = []
        backward: list[Step] = []
        for node in self.graph.nodes:
            if node.op == "output":
                break
            values[node] = Value(len(values))
            if node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                step = Step(values[node], node.target, tuple(args), tuple(kwargs.items()))
                (backward if self.given[0] in values else forward).append(step)
        return Body(
            operands=tuple(map(values.__getitem__, self.operands)),
            forward=tuple(forward),
            results=tuple(map(values.__getitem__, results)),
            given=tuple(map(values.__getitem__, self.given)),
            backward=tuple(backward),
            gradients=tuple(None if x is None else values[x] for x in gradients),
        )


def graph_of(body: Body, operands: Sequence[torch.Tensor]) -> BodyGraph:
    """The body as a graph whose values are fakes, computed from the fakes ``operands``."""
    graph = fx.Graph()
    nodes: dict[Value, fx.Node] = {}

    def placeholder(value: Value, fake: torch.Tensor) -> None:
        nodes[value] = graph.placeholder(f"v{value.index}")
        nodes[value].meta["val"] = fake
        notes.note(nodes[value]).differentiable = False

    def add(steps: Sequence[Step]) -> None:
        for step in steps:
            args, kwargs = step.arguments(nodes)
            node = nodes[step.value] = graph.call_function(step.target, tuple(args), kwargs)
            compute_value(node)
            notes.note(node).differentiable = False

    with operands[0].fake_mode, torch.no_grad():
        for value, fake in zip(body.operands, operands, strict=True):
            placeholder(value, fake)
        add(body.forward)
        for value, result in zip(body.given, body.results, strict=True):
            placeholder(value, torch.empty_like(dataflow.value(nodes[result])))
        add(body.backward)
    found = BodyGraph(
        graph,
        operands=tuple(map(nodes.__getitem__, body.operands)),
        results=tuple(map(nodes.__getitem__, body.results)),
        given=tuple(map(nodes.__getitem__, body.given)),
        gradients=tuple(None if x is None else nodes[x] for x in body.gradients),
    )
    return found.close()


def body_of(node: fx.Node) -> str:
    """The text of the body that the node runs."""
    return node.args[_BODY]


def set_body(node: fx.Node, text: str) -> None:
    node.update_arg(_BODY, text)


def name_of(node: fx.Node) -> Any:
    """What the function that the node runs is called."""
    return node.args[0]
