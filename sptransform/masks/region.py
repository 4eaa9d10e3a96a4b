"""Reads a mask in the graph as an expression over tensors that have the query or the key dimension, but not both.

The walk goes back from the mask through ops whose result has both dimensions:

1. Pointwise ops become part of the expression.
2. Rearranging ops (expand, unsqueeze, a view with another number of dimensions, a slice of everything) are left out:
   their operand gets another place in the shape of the scores. So the program contains no sizes.
3. Of a conversion only the dtype is kept.
4. A tensor of equal entries becomes a scalar; ``tril`` and ``triu`` become pointwise ops over positions.
5. A lookup by whole numbers in a table, of which each head may have its own, becomes a lookup by an expression, also
   where the index was flattened for it.
6. Anything else becomes a leaf with both dimensions: exact, but materialised.

What is read through a node without a gradient (a comparison, ``detach``, ``no_grad``) gets none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sptransform.graph import dataflow, notes
from sptransform.graph.calls import op_call, rule_at
from sptransform.masks.emit import OPENED, filled, unflattened
from sptransform.masks.expressions import (
    ENTRIES,
    HEADS,
    KEYS,
    QUERIES,
    Apply,
    Expression,
    Leaf,
    Places,
    from_the_right,
    has,
)
from sptransform.op_rules.mask_ops import CONVERT, FILLED, LOOKUP, LOOKUPS, PIECES, RETYPED
from sptransform.op_rules.rearrangement import REARRANGEMENTS, RESHAPES
from sptransform.ops.mask_program import is_elementwise
from sptransform.rules.rule import map_nodes
from sptransform.rules.table import RuleTable


class Regions:
    """Reads masks of one graph; nodes that several masks share are read once."""

    def __init__(self, rules: RuleTable) -> None:
        self._rules = rules
        self._read: dict[tuple[fx.Node, Places, bool], Expression] = {}

    def expression(self, mask: fx.Node) -> Expression:
        """The expression of ``mask``, which broadcasts to the scores."""
        is_trained = bool(notes.note(mask).differentiable)
        return self._expression(mask, from_the_right(len(dataflow.shape(mask))), mask, is_trained)

    def _expression(self, node: fx.Node, places: Places, reader: fx.Node, is_trained: bool) -> Expression:
        """``is_trained``: all nodes from the mask to here have a gradient."""
        has_gradient = bool(notes.note(node).differentiable)
        key = (node, places, is_trained and has_gradient)
        if key not in self._read:
            inside = None
            if node.op == "call_function" and has(node, places, QUERIES) and has(node, places, KEYS):
                inside = self._inside(node, places, is_trained and has_gradient)
            leaf = Leaf(node, places, reader, detached=has_gradient and not is_trained)
            self._read[key] = leaf if inside is None else inside
        return self._read[key]

    def _inside(self, node: fx.Node, places: Places, is_trained: bool) -> Expression | None:
        """What ``node`` computes; None where it is a leaf."""
        operands = dataflow.operands(node)
        if node.target in FILLED:
            value = FILLED[node.target](op_call(node))
            return None if isinstance(value, fx.Node) else Leaf(filled(node, value), (), node)
        if node.target in OPENED:
            return self._expression(OPENED[node.target](node), places, node, is_trained)
        if node.target in RETYPED:
            return self._retyped(node, operands[0], places, is_trained)
        if node.target in REARRANGEMENTS or node.target in PIECES:
            return self._rearranged(node, places, is_trained)
        if node.target in LOOKUPS:
            return self._looked_up(node, places, is_trained)
        if is_elementwise(node.target):
            return self._applied(node, places, is_trained)
        return None

    def _retyped(self, node: fx.Node, operand: fx.Node, places: Places, is_trained: bool) -> Expression | None:
        new, old = dataflow.value(node), dataflow.value(operand)
        if new.device != old.device:
            return None
        inside = self._expression(operand, places, node, is_trained)
        return inside if new.dtype == old.dtype else Apply(CONVERT, (inside, new.dtype), {}, new.dtype)

    def _rearranged(self, node: fx.Node, places: Places, is_trained: bool) -> Expression | None:
        (operand,) = dataflow.operands(node)
        if node.target in RESHAPES and operand.target in LOOKUPS:
            opened = unflattened(node, LOOKUPS[operand.target](op_call(operand)))
            if opened is not None:
                return self._expression(opened, places, node, is_trained)
        rule = rule_at(node, self._rules)
        if rule is None or rule.resize:
            return None
        place_of: dict[tuple[str, ...], int | None] = dict(zip(rule.results[0], places, strict=True))
        if any(factors and factors not in place_of for factors in rule.operands[0]):
            return None  # a dimension is split, joined or repeated
        own = tuple(place_of[factors] if factors else None for factors in rule.operands[0])
        # dimensions of size 1 have no factor; they keep their place if all others line up
        if len(own) <= len(places) and all(a is None or a == b for a, b in zip(own, places[-len(own) :], strict=True)):
            own = places[-len(own) :]
        inside = self._expression(operand, own, node, is_trained)
        # a leaf has both dimensions anyway: prefer ``node`` as the leaf if only the operand would need a view
        is_whole = isinstance(inside, Leaf) and inside.has(QUERIES) and inside.has(KEYS)
        if is_whole and not inside.broadcasts and places == from_the_right(len(places)):
            return None
        return inside

    def _looked_up(self, node: fx.Node, places: Places, is_trained: bool) -> Expression | None:
        dim = LOOKUPS[node.target](op_call(node))
        if dim is None:
            return None
        table, index = dataflow.operands(node)
        is_on_one_device = dataflow.value(table).device == dataflow.value(index).device
        if dataflow.value(index).dtype not in (torch.int32, torch.int64) or not is_on_one_device:
            return None
        # the dimensions of the index stand where the table had the one in which is looked up
        end, shape = dim + len(dataflow.shape(index)), dataflow.shape(table)
        others = zip([*places[:dim], *places[end:]], [*shape[:dim], *shape[dim + 1 :]], strict=True)
        of_others = [place if size != 1 else None for place, size in others]
        if not {*of_others} <= {HEADS, None}:
            return None
        of_table = (*of_others[:dim], ENTRIES, *of_others[dim:])
        operands = (
            self._expression(table, of_table, node, is_trained),
            self._expression(index, places[dim:end], node, is_trained),
        )
        return Apply(LOOKUP, operands, {}, dataflow.value(node).dtype)

    def _applied(self, node: fx.Node, places: Places, is_trained: bool) -> Expression | None:
        arguments = (*node.args, *node.kwargs.values())
        device = dataflow.value(node).device
        if any(isinstance(x, fx.Node) and not _is_operand(x, device) for x in arguments):
            return None
        if any(not isinstance(x, fx.Node | bool | int | float | str | torch.dtype | None) for x in arguments):
            return None

        def read(x: Any) -> Any:
            if not isinstance(x, fx.Node):
                return x
            return self._expression(x, places[len(places) - len(dataflow.shape(x)) :], node, is_trained)

        args, kwargs = map_nodes((node.args, dict(node.kwargs)), read)
        return Apply(node.target, tuple(args), kwargs, dataflow.value(node).dtype)


def _is_operand(x: fx.Node, device: torch.device) -> bool:
    """Whether ``x`` is a tensor on ``device``, or a scalar tensor on any device."""
    return dataflow.is_tensor(x) and (dataflow.value(x).device == device or not dataflow.shape(x))
