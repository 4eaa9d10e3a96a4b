"""Compute in the order of the keys what a graph computes in an order that data says.

The ops stay the same, along the factors that :class:`DataOrders` followed. What changes is where the order begins: the
permutation becomes the positions 0, 1 .., what was sorted is read as it was, and a grouped product is told the group of
each row. Reading or adding at positions is then a repetition, or a sum of neighbours.
"""

from __future__ import annotations

import operator
from itertools import count

import torch
from torch import fx

from sptransform.graph import dataflow, notes
from sptransform.graph.calls import op_call, rule_at
from sptransform.graph.edit import emit_like
from sptransform.op_rules.data_order import ADDS, READS, WRITES, is_sum_of_rows, kernel_name
from sptransform.routing.orders import DataOrder, DataOrders
from sptransform.routing.positions import positions
from sptransform.rules.rule import OpRule
from sptransform.rules.table import RuleTable
from sptransform.sharding.sizes import Size

aten, sp = torch.ops.aten, torch.ops.sptransform

_REPEAT = aten.repeat_interleave.self_int


class Unsorter:
    """Nodes in the order of the keys, each made in front of the node that it stands for."""

    def __init__(self, orders: DataOrders, rules: RuleTable) -> None:
        self._orders = orders
        self._rules = rules
        self._made: dict[tuple[fx.Node, str], fx.Node] = {}

    def left(self, node: fx.Node) -> fx.Node | None:
        """What the node computes, without any order, if with it an order ends: by reading at the inverse, by writing at
        the permutation, or by a sum over everything that is in the order.
        """
        operands = dataflow.operands(node)
        if node.target in READS and (place := READS[node.target](op_call(node))) is not None:
            order = self._orders.inverses.get(operands[place.index])
            if order is not None and self._orders.along(operands[0], place.dim) == order:
                return _as_in(node, self.unsorted(operands[0], place.dim))
        if node.target in WRITES and (place := WRITES[node.target](op_call(node))) is not None:
            order = self._orders.permutations.get(operands[place.index])
            is_whole = dataflow.shape(operands[-1]) == dataflow.shape(node)
            if order is not None and is_whole and self._orders.along(operands[-1], place.dim) == order:
                return _as_in(node, self.unsorted(operands[-1], place.dim))
        if node.target in self._rules and is_sum_of_rows(self._rules[node.target]) and dataflow.is_tensor(node):
            rule = rule_at(node, self._rules)
            for factor in () if rule is None else sorted(rule.reduce):
                if isinstance(self._orders.along_factor(node, rule, factor), DataOrder):
                    return self._again(node, rule, factor)
        return None

    def unsorted(self, node: fx.Node, dim: int) -> fx.Node:
        """The node's entries along ``dim``, which is in an order, in the order of the keys."""
        order = self._orders.along(node, dim)
        if not isinstance(order, DataOrder):
            return node  # all entries are equal
        if node in self._orders.permutations:
            value, (size,) = dataflow.value(node), dataflow.shape(node)
            return emit_like(order.sort, aten.arange.default, size, dtype=value.dtype, device=value.device)
        if node in self._orders.products:
            return self._grouped(node)
        producer, index = dataflow.projection(node) or (node, 0)
        if producer is order.sort:
            return order.keys
        rule = rule_at(producer, self._rules)
        (factor,) = rule.results[index][dim]
        made = self._again(producer, rule, factor)
        return made if producer is node else emit_like(node, operator.getitem, made, index)

    def _grouped(self, node: fx.Node) -> fx.Node:
        if (node, "") not in self._made:
            product = self._orders.products[node]
            rows, times = _unrepeated(self.unsorted(product.rows, 0))
            others = product.weight, product.order.keys, times, kernel_name(node.target)
            self._made[node, ""] = emit_like(node, sp.grouped_product.default, rows, *others)
        return self._made[node, ""]

    def _again(self, node: fx.Node, rule: OpRule, factor: str) -> fx.Node:
        """The node's op on operands that are in the order of the keys along ``factor``."""
        if (node, factor) not in self._made:
            indices = count()

            def operand(x: fx.Node) -> fx.Node:
                index = next(indices)
                dims = () if index in rule.unread else rule.operands[index]
                return self.unsorted(x, dims.index((factor,))) if (factor,) in dims else x

            args, kwargs = dataflow.map_operands(node, operand)
            self._made[node, factor] = _simpler(emit_like(node, node.target, *args, **kwargs), self._rules)
        return self._made[node, factor]


def _simpler(made: fx.Node, rules: RuleTable) -> fx.Node:
    """Reading, or adding, at positions as a repetition, or a sum; what converts rows, in front of their repetition."""
    for table, simpler in ((READS, _repeated), (ADDS, _summed)):
        place = table[made.target](op_call(made)) if made.target in table else None
        if place is None:
            continue
        operands = dataflow.operands(made)
        found = positions(operands[place.index], rules)
        size = dataflow.shape(operands[place.index])[place.index_dim]
        is_all = found is not None and dataflow.shape(operands[0])[place.dim] * found.step == size
        if is_all and found.dim == place.index_dim:
            return simpler(made, place.dim, found.step)
    if made.target is aten.to.dtype and (rows := dataflow.operands(made)[0]).target is _REPEAT:
        call, x = op_call(rows), emit_like(made, made.target, *dataflow.operands(rows), *made.args[1:], **made.kwargs)
        return emit_like(made, _REPEAT, x, call.argument("repeats"), call.argument("dim"))
    return made


def _unrepeated(rows: fx.Node) -> tuple[fx.Node, int]:
    """Rows, each of which ``rows`` has so many times in a row."""
    call = op_call(rows) if rows.target is _REPEAT else None
    if call is None or call.argument("dim") not in (0, -2) or not isinstance(call.argument("repeats"), int):
        return rows, 1
    return dataflow.operands(rows)[0], call.argument("repeats")


def _as_in(node: fx.Node, x: fx.Node) -> fx.Node:
    """``x`` where ``node`` is: without gradients, if it is in ``no_grad``."""
    is_kept = notes.region_of(node).grad_enabled or not notes.note(x).differentiable
    return x if is_kept else emit_like(node, aten.alias.default, x)


def _repeated(read: fx.Node, dim: int, step: Size) -> fx.Node:
    x = dataflow.operands(read)[0]
    return _as_in(read, x) if step == 1 else emit_like(read, _REPEAT, x, step, dim)


def _summed(added: fx.Node, dim: int, step: Size) -> fx.Node:
    x, *_, terms = dataflow.operands(added)
    shape = dataflow.shape(x)
    if dataflow.shape(terms) != (*shape[:dim], shape[dim] * step, *shape[dim + 1 :]):
        return added
    if step != 1:
        apart = emit_like(added, aten.reshape.default, terms, [*shape[:dim], shape[dim], step, *shape[dim + 1 :]])
        terms = emit_like(added, aten.sum.dim_IntList, apart, [dim + 1])
    return emit_like(added, aten.add.Tensor, x, terms)
