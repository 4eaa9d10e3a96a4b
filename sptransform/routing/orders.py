"""Which dimensions of a graph's tensors are in an order that data says, found forwards by the rules of the ops.

A sort of keys makes such an order, and what it returns is in it. Reading something at the permutation enters it, since
an index passes its dimensions to the result. From there on a rule is the proof: along a factor that an op keeps, and
that ranks may cut anywhere, an entry depends on its operands' entries at the same place. So operands in one order give
results in it. Products of sorted rows with the matrices of their groups have no such rule, as they read where groups
end. They are followed where these ends are known to be those of the sorted keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from sptransform.graph import dataflow
from sptransform.graph.calls import arguments_of, op_call, rule_at
from sptransform.op_rules.data_order import SORTS, WRITES, is_row_by_row, kernel_of
from sptransform.op_rules.mask_ops import RETYPED
from sptransform.routing.groups import are_below, counted_up_to, is_ascending, source
from sptransform.routing.positions import positions
from sptransform.rules.rule import OpRule
from sptransform.rules.table import RuleTable
from sptransform.sharding.sizes import number


@dataclass(frozen=True)
class DataOrder:
    """The order of a sort. Entry i of what is in it was entry ``permutation[i]`` in the order of the keys."""

    sort: fx.Node
    keys: fx.Node


@dataclass(frozen=True)
class Uniform:
    """All entries along a dimension are equal, and so in any order."""


UNIFORM = Uniform()


@dataclass(frozen=True)
class GroupedProduct:
    """A product of sorted rows by group, whose groups are the sorted keys."""

    rows: fx.Node
    weight: fx.Node
    order: DataOrder


class DataOrders:
    """The orders of a graph.

    Attributes:
        permutations: nodes that are the permutation of an order.
        inverses: nodes that are the inverse of one.
        products: grouped products in an order.
    """

    def __init__(self, graph: fx.Graph, rules: RuleTable) -> None:
        self._rules = rules
        self._found: dict[tuple[fx.Node, int], list[DataOrder | Uniform | None]] = {}
        self.permutations: dict[fx.Node, DataOrder] = {}
        self.inverses: dict[fx.Node, DataOrder] = {}
        self.products: dict[fx.Node, GroupedProduct] = {}
        if any(_is_sort(node) for node in graph.nodes):
            for node in graph.nodes:
                if node.op == "call_function" and dataflow.values(node):
                    self._visit(node)

    def along(self, node: fx.Node, dim: int) -> DataOrder | Uniform | None:
        """The order of the node's entries along ``dim``; None if it is none that data says."""
        found = self._found.get(dataflow.projection(node) or (node, 0))
        return None if found is None else found[dim]

    def along_factor(self, node: fx.Node, rule: OpRule, factor: str) -> DataOrder | Uniform | None:
        """The order that all operands have along a factor of the node's rule, those with equal entries aside."""
        found: set[DataOrder | Uniform | None] = set()
        if any(name == factor for _, _, name in rule.resize):
            return None
        for index, (operand, dims) in enumerate(zip(dataflow.operands(node), rule.operands, strict=True)):
            for dim, factors in enumerate(dims):
                if factor in factors and index not in rule.unread:
                    found.add(self.along(operand, dim) if factors == (factor,) else None)
        orders = found - {UNIFORM}
        return next(iter(orders), UNIFORM) if len(orders) <= 1 else None

    def _visit(self, node: fx.Node) -> None:
        if (picked := dataflow.projection(node)) is not None:
            if _is_sort(picked[0]) and picked[1] == SORTS[picked[0].target]:
                self._sorted(node, picked[0])
        elif _is_sort(node):
            order = DataOrder(node, dataflow.operands(node)[0])
            for index in range(len(dataflow.values(node))):
                self._found[node, index] = [order]
            if dataflow.is_tensor(node):
                self._sorted(node, node)
        else:
            self._follow(node)

    def _sorted(self, permutation: fx.Node, sort: fx.Node) -> None:
        """Note a permutation. That of a permutation is its inverse."""
        keys = dataflow.operands(sort)[0]
        self.permutations[permutation] = DataOrder(sort, keys)
        if keys in self.permutations and is_ascending(sort):
            self.inverses[permutation] = self.permutations[keys]

    def _follow(self, node: fx.Node) -> None:
        if node.target in RETYPED and dataflow.value(node).dtype in (torch.int32, torch.int64):
            for known in (self.permutations, self.inverses):
                if (before := dataflow.operands(node)[0]) in known:
                    known[node] = known[before]
        if (order := self._inverted(node)) is not None:
            self.inverses[node] = order
        elif (product := self._product(node)) is not None:
            self.products[node] = product
            self._found[node, 0] = [product.order, None]
        elif node.target in self._rules and is_row_by_row(self._rules[node.target]):
            rule = rule_at(node, self._rules)
            if rule is not None and not rule.roles:
                self._apply(node, rule)

    def _apply(self, node: fx.Node, rule: OpRule) -> None:
        for index, dims in enumerate(rule.results):
            kept = [factors[0] if len(factors) == 1 and factors[0] not in rule.replicated else None for factors in dims]
            found = [None if factor is None else self.along_factor(node, rule, factor) for factor in kept]
            if any(order is not None for order in found):
                self._found[node, index] = found

    def _inverted(self, node: fx.Node) -> DataOrder | None:
        """The order whose permutation the node inverts, by writing each position where the permutation says."""
        place = WRITES[node.target](op_call(node)) if node.target in WRITES else None
        if place is None or len(dataflow.shape(node)) != 1:
            return None
        operands = dataflow.operands(node)
        order, written = self.permutations.get(operands[place.index]), positions(operands[-1], self._rules)
        is_whole = dataflow.shape(operands[-1]) == dataflow.shape(node)
        return order if is_whole and written is not None and written.step == 1 else None

    def _product(self, node: fx.Node) -> GroupedProduct | None:
        """The node as a product by group, if its rows are in an order, and groups are that order's keys."""
        kernel = kernel_of(node.target)
        if kernel is None:
            return None
        given, defaults = arguments_of(node)
        rows, weight, ends = (given.pop(name) for name in (kernel.rows, kernel.weight, kernel.ends))
        is_plain = all(value == defaults.get(name) for name, value in given.items())
        if not is_plain or ends is None or len(dataflow.shape(weight)) != 3 or len(dataflow.shape(rows)) != 2:
            return None
        order, num_groups = self.along(rows, 0), number(dataflow.shape(weight)[0])
        if not isinstance(order, DataOrder) or not is_ascending(order.sort):
            return None
        counted = counted_up_to(ends, num_groups, self._rules)
        if counted is not source(order.keys, num_groups) or not are_below(order.keys, num_groups):
            return None
        is_integer = not dataflow.value(order.keys).is_floating_point()
        return GroupedProduct(rows, weight, order) if is_integer else None


def _is_sort(node: fx.Node) -> bool:
    """A sort of one list. Sorts along one of several dimensions have an order for each index of the others."""
    return node.target in SORTS and len(dataflow.shape(dataflow.operands(node)[0])) == 1
