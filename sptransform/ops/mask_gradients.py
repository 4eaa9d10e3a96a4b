"""Gradients of the operands of a mask program, in reverse through its steps.

A kernel cannot ask autograd, so the ops through which a gradient passes are listed here. A step on the path of an
operand that needs a gradient has to be one of them; the other steps may be any.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from sptransform.ops.lookup import grad_of_table
from sptransform.ops.mask_program import MaskProgram, Ref

aten = torch.ops.aten

# The gradient of one argument, from (gradient of the result, result, *arguments, **keywords); not yet reduced to the
# argument's shape
Pullback = Callable[..., Tensor]


def _same(grad: Tensor, *_: Any, **__: Any) -> Tensor:
    return grad


def _times(sign: int) -> Pullback:
    return lambda grad, out, a, b=None, alpha=1: grad * (sign * alpha)


def _where(index: int, holds: bool) -> Pullback:
    """Of what is taken where a condition ``holds``, or where it does not; ``index`` is that of the condition."""

    def pullback(grad: Tensor, out: Tensor, *arguments: Any) -> Tensor:
        return torch.where(arguments[index], *((grad, 0.0) if holds else (0.0, grad)))

    return pullback


def _unchanged(grad: Tensor, out: Tensor, x: Tensor, *_: Any) -> Tensor:
    """Where the op leaves its argument as it is."""
    return torch.where(out == x, grad, 0.0)


_SUM = {0: _same, 1: _times(1)}
_DIFFERENCE = {0: _same, 1: _times(-1)}
_PRODUCT: dict[int, Pullback] = {0: lambda grad, out, a, b: grad * b, 1: lambda grad, out, a, b: grad * a}
_QUOTIENT: dict[int, Pullback] = {
    0: lambda grad, out, a, b: grad / b,
    1: lambda grad, out, a, b: -grad * out / b,
}
_FILLED = {0: _where(1, False), 2: _where(1, True)}
_CHOSEN = {1: _where(0, True), 2: _where(0, False)}

# op -> the argument's index -> its gradient
PULLBACKS: dict[Any, dict[int, Pullback]] = {
    aten.abs.default: {0: lambda grad, out, x: grad * x.sign()},
    aten.add.Scalar: {0: _same},
    aten.add.Tensor: _SUM,
    aten.clamp.default: {0: _unchanged},
    aten.clamp_max.default: {0: _unchanged},
    aten.clamp_min.default: {0: _unchanged},
    aten.div.Scalar: {0: _QUOTIENT[0]},
    aten.div.Tensor: _QUOTIENT,
    aten.exp.default: {0: lambda grad, out, x: grad * out},
    aten.log.default: {0: lambda grad, out, x: grad / x},
    aten.masked_fill.Scalar: {0: _FILLED[0]},
    aten.masked_fill.Tensor: _FILLED,
    aten.mul.Scalar: {0: _PRODUCT[0]},
    aten.mul.Tensor: _PRODUCT,
    aten.multiply.Tensor: _PRODUCT,
    aten.neg.default: {0: _times(-1)},
    aten.negative.default: {0: _times(-1)},
    aten.pow.Tensor_Scalar: {0: lambda grad, out, x, n: grad * n * x.pow(n - 1) if n else grad * 0},
    aten.relu.default: {0: lambda grad, out, x: torch.where(out > 0, grad, 0.0)},
    aten.rsub.Scalar: {0: _times(-1)},
    aten.rsub.Tensor: {0: _times(-1), 1: _same},
    aten.sigmoid.default: {0: lambda grad, out, x: grad * out * (1 - out)},
    aten.sqrt.default: {0: lambda grad, out, x: grad / (2 * out)},
    aten.square.default: {0: lambda grad, out, x: grad * 2 * x},
    aten.sub.Scalar: {0: _same},
    aten.sub.Tensor: _DIFFERENCE,
    aten.subtract.Tensor: _DIFFERENCE,
    aten.tanh.default: {0: lambda grad, out, x: grad * (1 - out.square())},
    aten.to.dtype: {0: _same},
    aten.where.ScalarOther: {1: _CHOSEN[1]},
    aten.where.ScalarSelf: {2: _CHOSEN[2]},
    aten.where.self: _CHOSEN,
    torch.ops.sptransform.lookup.default: {0: lambda grad, out, table, index: grad_of_table(grad, table, index)},
}


def without_gradient(program: MaskProgram, trained: Collection[int]) -> Any:
    """The first op through which the gradient of one of the ``trained`` operands cannot pass; None if there is none."""
    reached = _reached(program, trained)
    for step in program.steps:
        listed = PULLBACKS.get(step.target, {})
        passed = all(at in listed for at, x in enumerate(step.args) if x in reached)
        if not passed or any(x in reached for _, x in step.kwargs):
            return step.target
    return None


def gradients(program: MaskProgram, operands: Sequence[Tensor], trained: Sequence[int], grad: Tensor) -> list[Tensor]:
    """The gradients of the ``trained`` operands, each in its shape and in the dtype of ``grad``, that of the mask.

    The operands broadcast to the mask; a condition is known to have no gradient, as is an index.
    """
    target = without_gradient(program, trained)
    if target is not None:
        raise NotImplementedError(f"{target} passes no gradient to the operands of a mask: detach them")
    reached = _reached(program, trained)
    values = program.values(operands, reached.union(*(step.refs for step in program.steps if reached & {*step.refs})))
    of_value = {Ref(len(values) - 1): grad.sum_to_size(values[-1].shape)}
    for index, step in reversed([*enumerate(program.steps, start=program.num_operands)]):
        own = of_value.pop(Ref(index), None)
        if own is None:
            continue
        args, kwargs = step.arguments(values)
        for at, x in enumerate(step.args):
            if x in reached:
                part = PULLBACKS[step.target][at](own, values[index], *args, **kwargs).sum_to_size(args[at].shape)
                of_value[x] = of_value[x] + part if x in of_value else part
    found = [(operands[i], of_value.get(Ref(i))) for i in trained]
    return [torch.zeros_like(x, dtype=grad.dtype) if part is None else part.to(grad.dtype) for x, part in found]


def _reached(program: MaskProgram, trained: Collection[int]) -> set[Ref]:
    """The values that are computed from a trained operand."""
    reached = set(map(Ref, trained))
    for index, step in enumerate(program.steps, start=program.num_operands):
        if any(x in reached for x in step.refs):
            reached.add(Ref(index))
    return reached
