"""Atoms of dimensions, carried along the ops of attention that is spelled out, and numbers among their operands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from sptransform.engine.axes import Atom, atoms_of, unify
from sptransform.graph import dataflow, notes
from sptransform.graph.calls import op_call, rule_at
from sptransform.op_rules.mask_ops import FILLED, RETYPED
from sptransform.op_rules.rearrangement import REARRANGEMENTS
from sptransform.rules.rule import Dims
from sptransform.rules.table import RuleTable

AtomDims = list[list[Atom]]


def dims_in_atoms(dims: Dims, atoms: Mapping[str, list[Atom]]) -> AtomDims:
    return [[atom for factor in factors for atom in atoms[factor]] for factors in dims]


def unified(left: AtomDims, right: AtomDims) -> bool:
    """Whether the dimensions are the same ones, which makes their atoms the same."""
    return len(left) == len(right) and all(unify(one, other) for one, other in zip(left, right, strict=True))


def rearranged(node: fx.Node, rules: RuleTable) -> tuple[AtomDims, AtomDims] | None:
    """The dimensions of the operand and of the result of an op of ``REARRANGEMENTS``; None if no rule says."""
    rule = rule_at(node, rules)
    if rule is None or rule.resize or len(rule.operands) != 1:
        return None
    atoms = {factor: atoms_of(size) for factor, size in rule.sizes.items()}
    return dims_in_atoms(rule.operands[0], atoms), dims_in_atoms(rule.results[0], atoms)


def source_of(x: fx.Node, dims: AtomDims, rules: RuleTable) -> tuple[fx.Node, AtomDims] | None:
    """What ``x``, whose dimensions are ``dims``, was before it was rearranged, repeated and cast, and its dimensions.

    On the way atoms are divided as the rearrangements say. None if they say otherwise than ``dims``. The way ends where
    gradients end.
    """
    while is_cast(x) or (x.target in REARRANGEMENTS and notes.passes_gradients(x)):
        if not is_cast(x):
            ends = rearranged(x, rules)
            if ends is None:
                break
            if not unified(dims, ends[1]):
                return None
            dims = ends[0]
        x = dataflow.operands(x)[0]
    return x, dims


def is_cast(node: fx.Node) -> bool:
    """Whether the node's result is its operand, perhaps in another precision, and passes gradients."""
    if node.target not in RETYPED or not notes.passes_gradients(node):
        return False
    return all(dataflow.value(x).dtype.is_floating_point for x in (node, node.args[0]))


def has_one_entry(x: Any) -> bool:
    """Whether ``x`` is a tensor of one entry that broadcasts to anything."""
    return isinstance(x, fx.Node) and dataflow.is_tensor(x) and dataflow.shape(x) in ((), (1,))


def number_of(x: Any) -> float | None:
    """The number that ``x`` is, written out or as a tensor filled with it."""
    if isinstance(x, int | float) and not isinstance(x, bool):
        return float(x)
    if not isinstance(x, fx.Node):
        return None
    if x.op == "get_attr":
        constant = getattr(x.graph.owning_module, x.target)
        return float(constant) if isinstance(constant, torch.Tensor) and has_one_entry(x) else None
    if x.target in RETYPED:
        return number_of(x.args[0])
    return number_of(FILLED[x.target](op_call(x))) if x.target in FILLED else None
