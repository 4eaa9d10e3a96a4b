"""A graph node as the call that rules read, and its rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sptransform.diagnostics.errors import RuleError, describe
from sptransform.graph import dataflow
from sptransform.rules.rule import OpCall, Operand, OpRule, Shape, map_nodes
from sptransform.rules.table import RuleTable
from sptransform.sharding.sizes import is_size, size_of


def op_call(node: fx.Node) -> OpCall:
    """The node's arguments and global shapes. Raises SymbolicSizeError for sizes that rules cannot express."""
    shapes: list[Shape] = []
    dtypes: list[torch.dtype] = []

    def operand(x: fx.Node) -> Operand:
        shapes.append(dataflow.shape(x))
        dtypes.append(dataflow.value(x).dtype)
        return Operand(len(shapes) - 1)

    args, kwargs = dataflow.map_operands(node, operand)
    args, kwargs = map_nodes((args, dict(kwargs)), _as_size)
    return OpCall(node.target, args, kwargs, tuple(shapes), dataflow.shapes(node), tuple(dtypes))


def arguments_of(node: fx.Node) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every argument of the node's op by its name, and the defaults of those that have one."""
    # Dynamo's graph may name an op without its overload
    schema = getattr(node.target, "default", node.target)._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    positional = (argument.name for argument in schema if not argument.kwarg_only)
    return defaults | dict(zip(positional, node.args, strict=False)) | dict(node.kwargs), defaults


def rule_at(node: fx.Node, rules: RuleTable) -> OpRule | None:
    """The rule of the node's op, applied to the node; None if it has none.

    Raises:
        RuleError: the rule does not fit the node.
    """
    call = op_call(node)
    try:
        return rules.rule_of(call)
    except RuleError as error:
        shapes = f"operands of shape {', '.join(map(str, call.operand_shapes))}, results {call.result_shapes}"
        raise RuleError(describe(str(error), node=node, found=shapes, fix="another rule: rules={..}")) from error


def _as_size(x: Any) -> Any:
    value = dataflow.value(x) if isinstance(x, fx.Node) else x
    # a number that is not a size stays as it is
    return size_of(value) if isinstance(value, torch.SymInt) and is_size(value) else x
