"""What ops compute, as formulas in the indices of their result.

A *form* is a sympy expression in lengths and in ``index(0)``, ``index(1)`` .., which count the result's dimensions from
the left; of a boolean tensor it is ``sympy.true`` or ``sympy.false``. None is a form that is not known. Forms describe
tensors of integers or booleans that depend on no input, whatever their lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean, BooleanAtom

from sptransform.op_rules.mask_ops import FILLED
from sptransform.rules.rule import OpCall, Operand, Shape

aten = torch.ops.aten

Form = sympy.Expr | Boolean


def index(dim: int) -> sympy.Symbol:
    return sympy.Symbol(f"i{dim}", integer=True, nonnegative=True)


def as_number(x: Any) -> sympy.Expr:
    """An int, a size or a form as a number: 1 for true, 0 for false."""
    if isinstance(x, BooleanAtom | bool):
        return sympy.Integer(bool(x))
    return sympy.sympify(x)


def broadcast(form: Form, shape: Shape, ndim: int) -> Form:
    """The form of a tensor of ``shape``, in the indices of a result with ``ndim`` dimensions that it broadcasts to."""
    shift = ndim - len(shape)
    moved = {index(dim): sympy.Integer(0) if size == 1 else index(dim + shift) for dim, size in enumerate(shape)}
    return form.subs(moved, simultaneous=True)


def _compared(relation: Callable[..., Boolean]) -> Callable[..., Form | None]:
    def form(a: Any, b: Any) -> Form | None:
        found = relation(sympy.expand(as_number(a) - as_number(b)), 0)
        return found if isinstance(found, BooleanAtom) else None

    return form


def _logical(combine: Callable[..., Boolean]) -> Callable[..., Form | None]:
    def form(*operands: Any) -> Form | None:
        return combine(*operands) if all(isinstance(x, Boolean) for x in operands) else None

    return form


def _sum(a: Any, b: Any, *, alpha: int = 1) -> Form:
    return as_number(a) + alpha * as_number(b)


def _difference(a: Any, b: Any, *, alpha: int = 1) -> Form:
    return as_number(a) - alpha * as_number(b)


# Comparisons, as relations of sympy
RELATIONS: dict[Any, Callable[..., Boolean]] = {
    getattr(getattr(aten, name), overload): relation
    for names, relation in (
        (("eq",), sympy.Eq),
        (("ge", "greater_equal"), sympy.Ge),
        (("gt", "greater"), sympy.Gt),
        (("le", "less_equal"), sympy.Le),
        (("lt", "less"), sympy.Lt),
        (("ne", "not_equal"), sympy.Ne),
    )
    for name in names
    for overload in ("Scalar", "Tensor")
}

# Pointwise ops, of the forms of their operands
POINTWISE: dict[Any, Callable[..., Form | None]] = {
    **{op: _compared(relation) for op, relation in RELATIONS.items()},
    aten.__and__.Tensor: _logical(sympy.And),
    aten.__or__.Tensor: _logical(sympy.Or),
    aten.abs.default: lambda x: sympy.Abs(as_number(x)),
    aten.add.Tensor: _sum,
    aten.bitwise_and.Tensor: _logical(sympy.And),
    aten.bitwise_not.default: _logical(sympy.Not),
    aten.bitwise_or.Tensor: _logical(sympy.Or),
    aten.logical_and.default: _logical(sympy.And),
    aten.logical_not.default: _logical(sympy.Not),
    aten.logical_or.default: _logical(sympy.Or),
    aten.mul.Tensor: lambda a, b: as_number(a) * as_number(b),
    aten.neg.default: lambda x: -as_number(x),
    aten.rsub.Scalar: lambda a, b, alpha=1: as_number(b) - alpha * as_number(a),
    aten.rsub.Tensor: lambda a, b, *, alpha=1: as_number(b) - alpha * as_number(a),
    aten.sub.Tensor: _difference,
}


def _filled(call: OpCall, forms: Sequence[Form | None]) -> Form | None:
    value = FILLED[call.target](call)
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    is_whole = isinstance(value, int | sympy.Expr) or (isinstance(value, float) and value.is_integer())
    return as_number(int(value) if isinstance(value, float) else value) if is_whole else None


def _counted(start: Any = 0, step: Any = 1) -> Form | None:
    is_known = isinstance(start, int | sympy.Expr) and isinstance(step, int)
    return as_number(start) + step * index(0) if is_known else None


def _sliced(call: OpCall, forms: Sequence[Form | None]) -> Form | None:
    dim, start = call.argument("dim") % len(call.operand_shapes[0]), call.argument("start") or 0
    if forms[0] is None or not isinstance(start, int) or start < 0:
        return None
    return forms[0].subs(index(dim), start + call.argument("step") * index(dim))


def _indexed(call: OpCall, forms: Sequence[Form | None]) -> Form | None:
    """A lookup by one tensor of positions a dimension; negative indices, which count from the end, have no form."""
    source, *_ = forms
    indices = call.argument("indices")
    if source is None or len(indices) != len(call.operand_shapes[0]) or None in indices:
        return None
    found = {}
    for dim, operand in enumerate(indices):
        if not source.has(index(dim)):
            continue
        form = forms[operand.index]
        if not isinstance(form, sympy.Expr) or not form.is_nonnegative:
            return None
        found[index(dim)] = broadcast(form, call.operand_shapes[operand.index], len(call.result_shapes[0]))
    return source.subs(found, simultaneous=True)


def _accumulated(call: OpCall, forms: Sequence[Form | None]) -> Form | None:
    at = index(call.argument("dim") % len(call.operand_shapes[0]))
    return None if forms[0] is None or forms[0].has(at) else as_number(forms[0]) * (at + 1)


def _joined(pieces: Sequence[tuple[Form | None, Shape]], dim: int) -> Form | None:
    """The form of pieces one after the other, if one formula continues over all of them."""
    start, moved = sympy.Integer(0), []
    for form, shape in pieces:
        if form is None:
            return None
        moved.append((sympy.expand(form.subs(index(dim), index(dim) - start)), start, shape[dim]))
        start = start + shape[dim]
    # the longest piece says what the formula is; a piece of one entry has to agree at this entry
    whole, *_ = max(moved, key=lambda piece: piece[2] != 1)
    for form, at, size in moved:
        place = {index(dim): at} if size == 1 else {}
        if sympy.expand(form.subs(place) - whole.subs(place)) != 0:
            return None
    return whole


def _concatenated(call: OpCall, forms: Sequence[Form | None]) -> Form | None:
    dim = call.argument("dim") % len(call.result_shapes[0])
    return _joined([*zip(map(_as_number_or_none, forms), call.operand_shapes, strict=True)], dim)


def _differences(call: OpCall, forms: Sequence[Form | None]) -> Form | None:
    if call.argument("n") != 1:
        return None
    dim = call.argument("dim") % len(call.operand_shapes[0])
    order = [call.argument("prepend"), Operand(0), call.argument("append")]
    at = [x.index for x in order if isinstance(x, Operand)]
    form = _joined([(_as_number_or_none(forms[i]), call.operand_shapes[i]) for i in at], dim)
    return None if form is None else sympy.expand(form.subs(index(dim), index(dim) + 1) - form)


def _as_number_or_none(form: Form | None) -> Form | None:
    return None if form is None else as_number(form)


# A form of one operand with which the other does not matter
ABSORBING: dict[Any, Boolean] = {
    aten.__and__.Tensor: sympy.false,
    aten.__or__.Tensor: sympy.true,
    aten.bitwise_and.Tensor: sympy.false,
    aten.bitwise_or.Tensor: sympy.true,
    aten.logical_and.default: sympy.false,
    aten.logical_or.default: sympy.true,
}

# Other ops, of the call and the forms of its operands
FORMS: dict[Any, Callable[[OpCall, Sequence[Form | None]], Form | None]] = {
    **dict.fromkeys(FILLED, _filled),
    aten.arange.default: lambda call, forms: _counted(),
    aten.arange.start: lambda call, forms: _counted(call.argument("start")),
    aten.arange.start_step: lambda call, forms: _counted(call.argument("start"), call.argument("step")),
    aten.cat.default: _concatenated,
    aten.cumsum.default: _accumulated,
    aten.diff.default: _differences,
    aten.index.Tensor: _indexed,
    aten.slice.Tensor: _sliced,
}
