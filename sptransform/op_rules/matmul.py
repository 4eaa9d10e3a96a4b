"""Contractions."""

from __future__ import annotations

import re
from typing import Any

import torch

import sptransform.ops  # noqa: F401 - registers the ops this table names
from sptransform.rules.einsum import rule
from sptransform.rules.rule import OpCall, OpRule, RuleFn
from sptransform.rules.table import OpEntry

aten, sp = torch.ops.aten, torch.ops.sptransform


_EACH = ((0,), (1,))


def matmul(call: OpCall) -> OpRule:
    """``torch.matmul`` with its 1-D forms; a contraction over one entry is an outer product and not heavy."""
    a, b = (len(shape) for shape in call.operand_shapes)
    left = "k" if a == 1 else "... i k" if b <= 2 or a > 2 else "i k"
    right = "k" if b == 1 else "... k j" if b > 2 else "k j"
    lead = "... " if max(a, b) > 2 else ""
    out = lead + ("i " if a > 1 else "") + ("j" if b > 1 else "")
    text = f"{left}, {right} -> {out}"
    inner = call.operand_shapes[0][-1]
    reduce = "k" if inner != 1 else ""
    return rule(text, reduce=reduce, linear=_EACH, heavy=inner != 1)(call)


def linear(call: OpCall) -> OpRule | None:
    """``x W^T + b``. With a bias the contracted factor stays whole: a bias added on every rank is added N times.

    None for a 1-D weight.
    """
    if len(call.operand_shapes[1]) != 2:
        return None
    has_bias = len(call.operand_shapes) == 3
    contracted = {"replicated": "k"} if has_bias else {"reduce": "k", "linear": _EACH}
    return rule("... k, o k, o -> ... o", heavy=True, **contracted)(call)


def _biased(left: str, right: str, out: str) -> RuleFn:
    """A product added to an operand that broadcasts to the result; as in :func:`linear`, ``k`` stays whole."""

    def apply(call: OpCall) -> OpRule:
        names = out.split()
        bias = " ".join(names[len(names) - len(call.operand_shapes[0]) :])
        return rule(f"{bias}, {left}, {right} -> {out}", replicated="k", heavy=True)(call)

    return apply


def solved(call: OpCall) -> OpRule | None:
    """A triangular system for each entry of the batch, and each right-hand side; None for systems from the right."""
    if not call.argument("left"):
        return None
    return rule("... i j, ... j k -> ... i k", replicated="i j", linear=((1,),), heavy=True)(call)


def einsum(call: OpCall) -> OpRule | None:
    """``torch.einsum``, whose equation is the rule.

    None for a repeated subscript within one operand, and for an ellipsis that is summed over.
    """
    equation = call.argument("equation").replace(" ", "")
    left, arrow, right = equation.partition("->")
    operands = left.split(",")
    if not arrow:
        once = sorted(c for c in set(left) if c.isalpha() and left.count(c) == 1)
        right = "".join(["..." if "..." in left else "", *once])
    if any(len(set(part.replace("...", ""))) != len(part.replace("...", "")) for part in operands):
        return None
    if "..." in left and "..." not in right:
        return None

    def spaced(part: str) -> str:
        return " ".join(re.findall(r"\.\.\.|\w", part))

    summed = sorted(set(re.findall(r"\w", left)) - set(right))
    text = f"{', '.join(map(spaced, operands))} -> {spaced(right)}"
    each = tuple((i,) for i in range(len(operands)))
    return rule(text, reduce=" ".join(summed), linear=each, heavy=bool(summed))(call)


def grouped_product(call: OpCall) -> OpRule:
    """Each row with the matrices of its groups, of which there are ``r`` one after the other; all stay with the row."""
    rows, text = call.operand_shapes[0][0], "n k, g k f, n -> n f"
    if call.argument("times") != 1:
        text = "n k, g k f, r -> r f" if rows == 1 else "n k, g k f, (n r) -> (n r) f"
    whole = "g" if call.argument("times") == 1 else "g r"
    return rule(text, reduce="k", replicated=whole, linear=_EACH, heavy=True)(call)


TABLE: list[tuple[Any, OpEntry | RuleFn]] = [
    (aten.addmm.default, _biased("i k", "k j", "i j")),
    (aten.baddbmm.default, _biased("b i k", "b k j", "b i j")),
    (aten.bmm.default, rule("b i k, b k j -> b i j", reduce="k", linear=_EACH, heavy=True)),
    (aten.dot.default, rule("k, k -> ", reduce="k", linear=_EACH)),
    (aten.einsum.default, einsum),
    (aten.linalg_solve_triangular.default, solved),
    (aten.linear.default, linear),
    (aten.matmul.default, matmul),
    (aten.mm.default, rule("i k, k j -> i j", reduce="k", linear=_EACH, heavy=True)),
    (aten.mv.default, rule("i k, k -> i", reduce="k", linear=_EACH, heavy=True)),
    (sp.grouped_product.default, grouped_product),
]
