"""Tensors of positions: each entry is its own index along a dimension, or that divided and rounded down."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from sptransform.graph import dataflow
from sptransform.graph.calls import op_call, rule_at
from sptransform.op_rules.data_order import QUOTIENTS
from sptransform.op_rules.mask_ops import PIECES, RETYPED
from sptransform.op_rules.rearrangement import REARRANGEMENTS
from sptransform.rules.table import RuleTable
from sptransform.sharding.sizes import Size

aten = torch.ops.aten

_COUNTING = frozenset({aten.arange.default, aten.arange.start, aten.arange.start_step})


@dataclass(frozen=True)
class Positions:
    """The entry at index i of ``dim`` is ``i // step``, whatever the other indices are."""

    dim: int
    step: Size


def positions(node: fx.Node, rules: RuleTable) -> Positions | None:
    """How a tensor of whole numbers has positions; None if it is not known to have."""
    if not dataflow.is_tensor(node) or node.op != "call_function" or dataflow.value(node).is_floating_point():
        return None
    if node.target in _COUNTING:
        call = op_call(node)
        start = 0 if node.target is aten.arange.default else call.argument("start")
        step = call.argument("step") if node.target is aten.arange.start_step else 1
        return Positions(0, 1) if (start, step) == (0, 1) else None
    is_same = is_unchanged(node)
    is_known = is_same or node.target in QUOTIENTS or node.target in REARRANGEMENTS
    found = positions(dataflow.operands(node)[0], rules) if is_known else None
    if found is None or is_same:
        return found
    if node.target in QUOTIENTS:
        number = QUOTIENTS[node.target](op_call(node))
        return None if number is None else Positions(found.dim, found.step * number)
    return _rearranged(node, found, rules)


def is_unchanged(node: fx.Node) -> bool:
    """Whether the node has the entries of its operand, each where it was; maybe of another dtype."""
    if node.target in PIECES:  # all of it
        return dataflow.shape(node) == dataflow.shape(dataflow.operands(node)[0])
    return node.target in RETYPED


def _rearranged(node: fx.Node, found: Positions, rules: RuleTable) -> Positions | None:
    """A dimension that repeats each index, as the product of it and others, counts more slowly."""
    rule = rule_at(node, rules)
    factors = () if rule is None else rule.operands[0][found.dim]
    for dim, names in enumerate(rule.results[0]) if factors else ():
        if names[: len(factors)] == factors:
            return Positions(dim, found.step * prod(rule.sizes[name] for name in names[len(factors) :]))
    return None
