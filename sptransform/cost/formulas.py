"""How counts of a training step depend on lengths and ranks, as exact formulas."""

from __future__ import annotations

from dataclasses import dataclass

import sympy

#: tokens of a sequence, rows of a batch, ranks
S, B, N = sympy.symbols("S B N", positive=True, integer=True)


@dataclass(frozen=True)
class Formula:
    """A count as an expression, equal to the count wherever it claims to hold.

    Attributes:
        expression: in :data:`S`, :data:`B`, :data:`N`, and whatever sizes of the model were left open.
        holds: where, in words: "S a multiple of 2N, N of 2, 4, 8".
        multiple: S is a multiple of this many times N.
        ranks: the N at which it holds; None if at every N that ``holds`` allows.
    """

    expression: sympy.Expr
    holds: str
    multiple: int = 1
    ranks: tuple[int, ...] | None = None
