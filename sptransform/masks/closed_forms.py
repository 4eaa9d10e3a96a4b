"""Formulas for tensors that depend on no input, in the indices of their dimensions, where lengths are open.

A tensor of an open length has no value to look at; see ``op_rules/closed_forms.py`` for what its form is.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean, BooleanAtom
from torch import fx

from sptransform.graph import dataflow
from sptransform.graph.calls import op_call, rule_at
from sptransform.masks.expressions import KEYS, QUERIES, Apply, Expression, Leaf
from sptransform.op_rules.closed_forms import ABSORBING, FORMS, POINTWISE, Form, as_number, broadcast, index
from sptransform.op_rules.mask_ops import CONVERT, RETYPED
from sptransform.op_rules.rearrangement import REARRANGEMENTS
from sptransform.rules.rule import Operand, map_nodes
from sptransform.rules.table import RuleTable

# positions of a query and of a key
QUERY, KEY = (sympy.Symbol(name, integer=True, nonnegative=True) for name in ("query", "key"))



class ClosedForms:
    """Forms of the nodes of one graph, and of mask expressions in ``QUERY`` and ``KEY``."""

    def __init__(self, rules: RuleTable) -> None:
        self._rules = rules
        self._forms: dict[fx.Node, Form | None] = {}

    def of(self, node: fx.Node) -> Form | None:
        if node not in self._forms:
            form = self._computed(node) if node.op == "call_function" and dataflow.is_tensor(node) else None
            self._forms[node] = None if form is None else _in_dtype(form, dataflow.value(node).dtype)
        return self._forms[node]

    def at(self, part: Expression) -> Form | None:
        """The form of a part of a mask, if it depends on the positions of query and key alone."""
        if isinstance(part, Leaf):
            form = self.of(part.node)
            if form is None:
                return None
            names = {QUERIES: QUERY, KEYS: KEY}
            shape = dataflow.shape(part.node)
            placed = {
                index(dim): names[place] if size != 1 else sympy.Integer(0)
                for dim, (place, size) in enumerate(zip(part.places, shape, strict=True))
                if place in names or size == 1
            }
            form = form.subs(placed, simultaneous=True)
            return form if form.free_symbols.isdisjoint(map(index, range(len(shape)))) else None
        operand, *others = map(self._argument, part.args)
        if part.target is CONVERT:
            return None if operand is None else _in_dtype(operand, part.dtype)
        if part.target not in POINTWISE or None in (operand, *others):
            return None
        form = POINTWISE[part.target](operand, *others, **part.kwargs)
        return None if form is None else _in_dtype(form, part.dtype)

    def _argument(self, x: Any) -> Any:
        """The form of an argument; None if it is not known, or no whole number."""
        if isinstance(x, Leaf | Apply):
            return self.at(x)
        return x if isinstance(x, int | torch.dtype) else None

    def _computed(self, node: fx.Node) -> Form | None:
        operands = dataflow.operands(node)
        if node.target in REARRANGEMENTS:
            return self._rearranged(node)
        if node.target in RETYPED:
            return self.of(operands[0])
        if node.target not in POINTWISE and node.target not in FORMS:
            return None
        call = op_call(node)
        forms = [self.of(x) for x in operands]
        if node.target in FORMS:
            return FORMS[node.target](call, forms)
        if None in forms:
            absorbing = ABSORBING.get(node.target)
            return absorbing if absorbing is not None and absorbing in forms else None
        ndim = len(call.result_shapes[0])
        placed = [broadcast(form, shape, ndim) for form, shape in zip(forms, call.operand_shapes, strict=True)]
        arguments = [*call.args, *call.kwargs.values()]
        if not all(isinstance(x, Operand | int | sympy.Expr) for x in arguments):
            return None
        args, kwargs = map_nodes(
            (call.args, dict(call.kwargs)), lambda x: placed[x.index] if isinstance(x, Operand) else x
        )
        return POINTWISE[node.target](*args, **kwargs)

    def _rearranged(self, node: fx.Node) -> Form | None:
        rule = rule_at(node, self._rules)
        form = self.of(dataflow.operands(node)[0])
        if rule is None or form is None:
            return None
        dim_of = {factors: dim for dim, factors in enumerate(rule.results[0]) if factors}
        moved = {}
        for dim, factors in enumerate(rule.operands[0]):
            if not form.has(index(dim)):
                continue
            if factors and factors not in dim_of:
                return None  # split or joined
            moved[index(dim)] = index(dim_of[factors]) if factors else sympy.Integer(0)
        return form.subs(moved, simultaneous=True)


def _in_dtype(form: Form, dtype: torch.dtype) -> Form | None:
    """The form of the tensor converted to ``dtype``; None if the conversion may round or wrap."""
    if dtype == torch.bool:
        if isinstance(form, Boolean):
            return form
        return sympy.sympify(form != 0) if form.is_number else None
    form = as_number(form)
    lowest = -1 if dtype.is_signed else 0
    return form if dtype == torch.int64 or (form.is_number and lowest <= form <= 1) else None


def constant_of(form: Form | None) -> bool | int | None:
    """The number behind the form, if it is one."""
    if isinstance(form, BooleanAtom):
        return bool(form)
    return int(form) if form is not None and form.is_Integer else None
