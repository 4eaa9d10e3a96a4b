"""What the nodes of a graph compute: fake values, shapes, operands, and which nodes pick one output of several."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sptransform.sharding.sizes import Size, size_of


def value(node: fx.Node) -> Any:
    """The fake value recorded at capture: a tensor, a tuple of tensors, or a plain value."""
    return node.meta.get("val")


def values(node: fx.Node) -> tuple[torch.Tensor, ...]:
    """The tensors among the node's outputs, in order."""
    return values_of(value(node))


def values_of(val: Any) -> tuple[torch.Tensor, ...]:
    """The tensors of a value that a node may have."""
    if isinstance(val, torch.Tensor):
        return (val,)
    if isinstance(val, list | tuple):
        return tuple(v for v in val if isinstance(v, torch.Tensor))
    return ()


def shapes(node: fx.Node) -> tuple[tuple[Size, ...], ...]:
    """Shapes of the node's tensor outputs."""
    return tuple(tuple(map(size_of, value.shape)) for value in values(node))


def shape(node: fx.Node) -> tuple[Size, ...]:
    return shapes(node)[0]


def fake_mode(graph: fx.Graph) -> Any:
    """The mode of the graph's fake values."""
    return next(value.fake_mode for node in graph.nodes for value in values(node))


def is_op(target: Any) -> bool:
    """Whether ``target`` is an overload of an op."""
    return hasattr(target, "_schema")


def handles_tensors(node: fx.Node) -> bool:
    """Whether the node is a call that reads or makes tensors. A getitem that picks an output does not count."""
    return node.op == "call_function" and projection(node) is None and bool(values(node) or operands(node))


def writes(node: fx.Node) -> bool:
    """Whether the node's op writes into one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def written_by(node: fx.Node) -> list[fx.Node]:
    """The tensors among its arguments that the node's op writes into."""
    arguments = node.target._schema.arguments
    given = [*zip(arguments, node.args, strict=False), *((x, node.kwargs.get(x.name)) for x in arguments)]
    return [x for argument, x in given if argument.is_write and isinstance(x, fx.Node)]


def returns_tensors(node: fx.Node) -> bool:
    """Whether the node's op returns tensors, as its schema says."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and any("Tensor" in str(x.type) for x in schema.returns)


def is_tensor(node: fx.Node) -> bool:
    return isinstance(value(node), torch.Tensor)


def projection(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(producer, index) if the node picks one output of a multi-output node; else None."""
    if node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return node.args[0], node.args[1]
    return None


def map_operands(node: fx.Node, fn: Callable[[fx.Node], Any]) -> tuple[Any, Any]:
    """The node's args and kwargs, ``fn`` applied to the producers of tensors in the order that rules number them."""
    return fx.map_arg((node.args, node.kwargs), lambda x: fn(x) if is_tensor(x) else x)


def operands(node: fx.Node) -> list[fx.Node]:
    """Producers of the tensor arguments, in the order that rules number them."""
    found: list[fx.Node] = []
    map_operands(node, found.append)
    return found
