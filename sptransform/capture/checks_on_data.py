"""Replace checks of numbers that a tensor holds by checks of the tensor::

    %item = item(%count)                            %eq = eq(%count, 12)
    %eq = operator.eq(%item, 12)                    _assert_async(%eq, "..")
    _assert_scalar(%eq, "..")

A graph whose numbers are data cannot be compiled for ranks. A number that is read by anything but a check is refused.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from sptransform.diagnostics.errors import CaptureError, describe
from sptransform.diagnostics.provenance import place
from sptransform.graph import dataflow
from sptransform.graph.edit import emit_like

aten = torch.ops.aten

# what a graph computes from numbers -> the same of tensors
_ON_TENSORS: dict[Any, Any] = {
    operator.add: aten.add.Tensor,
    operator.and_: aten.logical_and.default,
    operator.eq: aten.eq.Tensor,
    operator.floordiv: aten.floor_divide.default,
    operator.ge: aten.ge.Tensor,
    operator.gt: aten.gt.Tensor,
    operator.le: aten.le.Tensor,
    operator.lt: aten.lt.Tensor,
    operator.mod: aten.remainder.Tensor,
    operator.mul: aten.mul.Tensor,
    operator.ne: aten.ne.Tensor,
    operator.or_: aten.logical_or.default,
    operator.sub: aten.sub.Tensor,
    torch.sym_ite: aten.where.self,
    torch.sym_not: aten.logical_not.default,
}


def check_tensors(graph: fx.Graph) -> None:
    """Rewrite ``graph`` in place.

    Raises:
        CaptureError: something other than a check reads a number that a tensor holds.
    """
    tensors: dict[fx.Node, fx.Node] = {}  # a number -> the tensor that holds it

    def tensor(at: fx.Node, x: Any) -> fx.Node:
        if x in tensors:
            return tensors[x]
        dtype = torch.bool if isinstance(x, bool) else torch.int64 if isinstance(x, int) else torch.float64
        return emit_like(at, aten.scalar_tensor.default, x, dtype=dtype)

    for node in list(graph.nodes):
        if node.target is aten.item.default:
            tensors[node] = emit_like(node, aten.reshape.default, node.args[0], [])
        elif node.target is aten.scalar_tensor.default and node.args[0] in tensors:
            held, kept = tensors[node.args[0]], dataflow.value(node).dtype
            node.replace_all_uses_with(emit_like(node, aten.to.dtype, held, kept))
            graph.erase_node(node)
        elif node.target in _ON_TENSORS and node.all_input_nodes and tensors.keys() >= {*node.all_input_nodes}:
            tensors[node] = emit_like(node, _ON_TENSORS[node.target], *(tensor(node, x) for x in node.args))
        elif node.target is aten._assert_scalar.default and node.args[0] in tensors:
            condition = emit_like(node, aten.ne.Scalar, tensors[node.args[0]], 0)
            message = _literal(f"a check of the model failed: {place(node)}")
            emit_like(node, aten._assert_async.msg, condition, message)
            graph.erase_node(node)
        elif node.target is aten._assert_async.msg:
            node.update_arg(1, _literal(node.args[1]))
    for node in reversed(tensors):
        if node.users:
            reader = next(iter(node.users))
            raise CaptureError(
                describe(
                    "the graph depends on a number that a tensor holds",
                    node=reader,
                    found=f"%{node.name}, read by something other than a check",
                    fix="pass it to the model as a number, or compute with the tensor",
                )
            )
        graph.erase_node(node)


def _literal(message: str) -> str:
    """The message as Inductor can write it between quotes in C++, where it escapes nothing."""
    return " ".join(message.replace("\\", "/").replace('"', "'").split())
