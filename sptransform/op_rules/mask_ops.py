"""Properties of the ops that compute masks; ``ops/mask_program.py`` knows which are pointwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import sptransform.ops  # noqa: F401 - registers the lookup
from sptransform.ops.mask_program import is_elementwise
from sptransform.rules.rule import OpCall, Operand

aten = torch.ops.aten


# The ops that generated programs use: conjunction, negation, a bias with hidden entries, and a change of dtype
AND, NOT, HIDE, CONVERT = (
    aten.logical_and.default,
    aten.logical_not.default,
    aten.masked_fill.Scalar,
    aten.to.dtype,
)

# What generated programs have for an op of LOOKUPS
LOOKUP = torch.ops.sptransform.lookup.default


def _embedding(call: OpCall) -> int | None:
    """None where the gradient of a row is not the sum over its readers."""
    is_plain = call.argument("padding_idx") < 0 and not call.argument("scale_grad_by_freq")
    return 0 if is_plain and not call.argument("sparse") else None


def _index(call: OpCall) -> int | None:
    given = [dim for dim, x in enumerate(call.argument("indices")) if isinstance(x, Operand)]
    return given[0] if len(given) == 1 else None


# Ops whose second operand, whole numbers, says which entries of the first are read; in which of its dimensions, None if
# the call is no such lookup
LOOKUPS: dict[Any, Callable[[OpCall], int | None]] = {
    aten.embedding.default: _embedding,
    aten.index.Tensor: _index,
}

# The result is the first operand; only its dtype or device may change
RETYPED = frozenset(
    {
        aten._to_copy.default,
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.lift_fresh_copy.default,
        aten.to.device,
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.other,
        aten.type_as.default,
    }
)

# The result is a part of the operand, or all of it
PIECES = frozenset({aten.slice.Tensor})

# All entries of the result are this number
FILLED: dict[Any, Callable[[OpCall], Any]] = {
    aten.full.default: lambda call: call.argument("fill_value"),
    aten.full_like.default: lambda call: call.argument("fill_value"),
    aten.new_full.default: lambda call: call.argument("fill_value"),
    aten.new_ones.default: lambda call: 1,
    aten.new_zeros.default: lambda call: 0,
    aten.ones.default: lambda call: 1,
    aten.ones_like.default: lambda call: 1,
    aten.zeros.default: lambda call: 0,
    aten.zeros_like.default: lambda call: 0,
}

# Ops that read only the shape, dtype and device of their operand
LIKE = frozenset(
    {
        aten.full_like.default,
        aten.new_full.default,
        aten.new_ones.default,
        aten.new_zeros.default,
        aten.ones_like.default,
        aten.zeros_like.default,
    }
)

# If the two operands are positions, the result depends only on their distance: where both slopes have the same sign
# (+1), or opposite signs (-1)
OF_DISTANCE: dict[Any, int] = {
    aten.add.Tensor: -1,
    aten.eq.Tensor: 1,
    aten.ge.Tensor: 1,
    aten.greater.Tensor: 1,
    aten.greater_equal.Tensor: 1,
    aten.gt.Tensor: 1,
    aten.le.Tensor: 1,
    aten.less.Tensor: 1,
    aten.less_equal.Tensor: 1,
    aten.lt.Tensor: 1,
    aten.ne.Tensor: 1,
    aten.not_equal.Tensor: 1,
    aten.rsub.Tensor: 1,
    aten.sub.Tensor: 1,
    aten.subtract.Tensor: 1,
}

SUMS = frozenset({aten.add.Tensor})

# Argument indices of (condition, value where it is true, value where it is false)
CHOICES: dict[Any, tuple[int, int, int]] = {
    aten.masked_fill.Scalar: (1, 2, 0),
    aten.masked_fill.Tensor: (1, 2, 0),
    aten.where.ScalarOther: (0, 1, 2),
    aten.where.ScalarSelf: (0, 1, 2),
    aten.where.self: (0, 1, 2),
}

# Ops between the two contractions of attention that is spelled out. What a number as second argument multiplies by:
SCALES: dict[Any, Callable[[float], float]] = {
    aten.div.Scalar: lambda number: 1.0 / number,
    aten.div.Tensor: lambda number: 1.0 / number,
    aten.mul.Scalar: lambda number: number,
    aten.mul.Tensor: lambda number: number,
}

# The sign of the second operand
SIGNS: dict[Any, float] = {aten.add.Tensor: 1.0, aten.sub.Tensor: -1.0}

MAXIMA = frozenset({aten.amax.default, aten.max.dim})

# Of these, ``cap * f(score / cap)`` bounds the scores: a softcap
BOUNDED = frozenset({aten.tanh.default})

# One operand after the other along a dimension, and a part of one along a dimension: sinks are joined to scores, and
# their probabilities left out
JOINED = frozenset({aten.cat.default})
TAKEN = frozenset({aten.slice.Tensor})

SOFTMAX = frozenset({aten._softmax.default, aten.softmax.int})

DROPOUT: dict[Any, Callable[[OpCall], float]] = {
    aten.dropout.default: lambda call: call.argument("p") if call.argument("train") else 0.0,
}

# Contractions of their last two operands, added to the first: ``beta * first + alpha * product``
BIASED = frozenset({aten.baddbmm.default})


# Functions that, called with one tensor, combine its entries, and with two are pointwise
_OF_PAIRS = frozenset({"max", "min"})


def is_pointwise_function(name: str, num_tensors: int) -> bool:
    """Whether a function or method of this name computes each entry of its result from its operands' entries there.

    Those that read only shapes, as ``new_ones``, count where they make a scalar.
    """
    packet = getattr(aten, name, None)
    if packet is None or (name in _OF_PAIRS and num_tensors < 2):
        return False
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    return any(is_elementwise(overload) or overload in LIKE or overload in RETYPED for overload in overloads)
