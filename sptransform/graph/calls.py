"""A graph node as the call that rules read."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sptransform.graph import dataflow
from sptransform.rules.rule import OpCall, Operand, Shape, map_nodes
from sptransform.sharding.sizes import is_size, size_of


def op_call(node: fx.Node) -> OpCall:
    """The node's arguments and global shapes. Raises SymbolicSizeError for sizes that rules cannot express."""
    shapes: list[Shape] = []

    def operand(x: fx.Node) -> Operand:
        shapes.append(dataflow.shape(x))
        return Operand(len(shapes) - 1)

    args, kwargs = dataflow.map_operands(node, operand)
    args, kwargs = map_nodes((args, dict(kwargs)), _as_size)
    return OpCall(node.target, args, kwargs, tuple(shapes), dataflow.shapes(node))


def _as_size(x: Any) -> Any:
    value = dataflow.value(x) if isinstance(x, fx.Node) else x
    # a number that is not a size stays as it is
    return size_of(value) if isinstance(value, torch.SymInt) and is_size(value) else x
