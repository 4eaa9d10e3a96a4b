"""Sizes as rules and partitions see them: ints, or integer polynomials where Dynamo left a length symbolic.

A symbolic length ``s`` that ``num_ranks`` divides is written ``num_ranks * k``, where ``k`` is one rank's share; one
that it does not is ``k``, which no rank can share. Every size of the graph is then a polynomial in such ``k``: equality
is structural, and comparing sizes adds no guard.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import sympy
import torch
from sympy.core.relational import Relational

Size = int | sympy.Expr

# ShapeEnv -> {s: num_ranks * k, or k}. Keyed by ShapeEnv, because symbols have a meaning only within theirs.
_LENGTHS: WeakKeyDictionary[Any, dict[sympy.Symbol, sympy.Expr]] = WeakKeyDictionary()


class SymbolicSizeError(ValueError):
    """A symbolic size was used where a number is needed; the graph must be captured with the size fixed."""


# what raises TypeError because a size is symbolic: sympy, of its truth value or number, and torch, of its hash
_UNDECIDED = {
    conversion.__code__
    for conversion in (Relational.__bool__, sympy.Expr.__int__, sympy.Expr.__float__, torch.SymInt.__hash__)
}


def needs_number(error: BaseException) -> bool:
    """Whether the error was raised because a symbolic size was used where a number is needed.

    For a comparison that depends on the length, sympy raises TypeError, and torch where sizes are sorted out in a set.
    So do many bugs; the raising frame decides.
    """
    if isinstance(error, SymbolicSizeError):
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return isinstance(error, TypeError) and bool(frames) and frames[-1].f_code in _UNDECIDED


def number(size: Size) -> int:
    """The size, if it is a number. Raises SymbolicSizeError otherwise."""
    if isinstance(size, int):
        return size
    raise SymbolicSizeError(f"the graph has to know the number behind {size}")


def split_length(length: torch.SymInt, num_ranks: int) -> None:
    """Write a symbolic length as ``num_ranks * k`` if ``num_ranks`` divides it, else as ``k``.

    Dynamo records which as a guard, and recompiles for a length that fails it.
    """
    expression = length.node.expr
    if not isinstance(expression, sympy.Symbol):
        return
    local = sympy.Symbol(f"k_{expression.name}", integer=True, positive=True)
    is_shared = bool(length % num_ranks == 0)
    _LENGTHS.setdefault(length.node.shape_env, {})[expression] = num_ranks * local if is_shared else local


def size_of(x: int | torch.SymInt) -> Size:
    """The size behind an int or SymInt.

    Raises:
        SymbolicSizeError: it is not an integer polynomial in per-rank shares (rounded, or dependent on another input).
    """
    if not isinstance(x, torch.SymInt):
        return x
    if not is_size(x):
        raise SymbolicSizeError(f"{x.node.expr} is no polynomial in lengths that the ranks share evenly")
    expression = x.node.expr.xreplace(lengths_of(x))
    return int(expression) if expression.is_Integer else expression


def is_size(x: torch.SymInt) -> bool:
    """Whether a SymInt is a number, or an integer polynomial in per-rank shares of lengths."""
    lengths = lengths_of(x)
    expression = x.node.expr.xreplace(lengths)
    known = {symbol for whole in lengths.values() for symbol in whole.free_symbols}
    return expression.free_symbols <= known and (expression.is_Integer or _is_integer_polynomial(expression))


def _is_integer_polynomial(expression: sympy.Expr) -> bool:
    symbols = sorted(expression.free_symbols, key=str)
    if not expression.is_polynomial(*symbols):
        return False
    return all(coefficient.is_Integer for coefficient in sympy.Poly(expression, *symbols).coeffs())


def quotient(size: Size, divisor: Size) -> Size | None:
    """``size / divisor`` if it is an integer for all values of the lengths; else None."""
    if isinstance(size, int) and isinstance(divisor, int):
        return size // divisor if divisor and size % divisor == 0 else None
    ratio = sympy.expand(sympy.cancel(sympy.sympify(size) / divisor))
    if ratio.is_Integer:
        return int(ratio)
    return ratio if ratio.free_symbols and _is_integer_polynomial(ratio) else None


def broadcast(*shapes: tuple[Size, ...]) -> tuple[Size, ...] | None:
    """``torch.broadcast_shapes`` of sizes that may be symbolic; None if they do not broadcast."""
    result: list[Size] = [1] * max(map(len, shapes))
    for shape in shapes:
        for at, size in enumerate(shape, start=len(result) - len(shape)):
            if size == 1:
                continue
            if result[at] not in (1, size):
                return None
            result[at] = size
    return tuple(result)


def order(size: Size) -> int:
    """Sort key for sizes: a divisor never sorts after its multiple."""
    if isinstance(size, int):
        return size
    return int(size.subs(dict.fromkeys(size.free_symbols, 1_000_003)))


def lengths_of(x: torch.SymInt) -> Mapping[sympy.Symbol, sympy.Expr]:
    return _LENGTHS.get(x.node.shape_env, {})
