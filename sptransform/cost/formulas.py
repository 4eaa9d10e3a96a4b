"""How counts of a training step depend on lengths and ranks: exact formulas, fitted to counts and checked on more.

With everything even, a rank's part of a tensor is a polynomial in the tokens S and rows B, over the number of ranks.
What a collective sends of the whole tensor is known for each kind (:data:`SHARES`). So a count is a sum of few terms
whose coefficients follow from as many counts, in exact arithmetic. More counts than terms are given, and if one of
them does not agree, there is no formula: none is returned, rather than one that holds at some places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import sympy

from sptransform.cost.records import Step, Work

#: tokens of a sequence, rows of a batch, ranks; of two mesh dims, ranks of the outer one and of the inner one
S, B, N = sympy.symbols("S B N", positive=True, integer=True)
R, U = sympy.symbols("R U", positive=True, integer=True)

#: what each of n ranks sends of a tensor, as a share of all of it; of a ring, the tensor is what all hops pass on. In
#: an all-to-all every rank gets its share, or, where heads are fewer than ranks, one that others get too
SHARES: Mapping[str, Sequence[Callable[[Any], Any]]] = {
    "all_gather": [lambda n: (n - 1) / n],
    "all_reduce": [lambda n: 2 * (n - 1) / n],
    "all_to_all": [lambda n: (n - 1) / n**2, lambda n: (n - 1) / n],
    "reduce_scatter": [lambda n: (n - 1) / n],
    "send_recv": [lambda n: (n - 1) / n],
}

Point = Mapping[sympy.Symbol, int]
Terms = Sequence[sympy.Expr]


@dataclass(frozen=True)
class Formula:
    """A count as an expression, equal to the count wherever it claims to hold.

    Attributes:
        expression: in :data:`S`, :data:`B`, :data:`N` (or :data:`R`, :data:`U`), and what else was left open.
        holds: where, in words.
        at: the points at which it was counted.
    """

    expression: sympy.Expr
    holds: str
    at: tuple[Point, ...] = ()

    def value(self, point: Point) -> sympy.Rational:
        """The count at a point."""
        return sympy.nsimplify(self.expression.subs(dict(point)))


def fitted(terms: Terms, counts: Sequence[tuple[Point, int]]) -> sympy.Expr | None:
    """The sum of multiples of ``terms`` that equals all ``counts``; None if there is none, or more than one.

    Only what the counts decide is claimed: with as many terms as counts nothing would be checked, so that is None too.
    """
    unknown = sympy.symbols(f"c:{len(terms)}")
    rows = [[sympy.sympify(term).subs(dict(point)) for term in terms] for point, _ in counts]
    matrix, values = sympy.Matrix(rows), sympy.Matrix([count for _, count in counts])
    if len(counts) <= len(terms) or matrix.rank() < len(terms):
        return None
    (found,) = sympy.linsolve((matrix, values), *unknown) or (None,)
    if found is None:
        return None
    return sympy.factor_terms(sum(c * term for c, term in zip(found, terms, strict=True)))


def polynomials(degrees: Mapping[sympy.Symbol, int]) -> list[sympy.Expr]:
    """Every product of powers up to these degrees, 1 among them."""
    powers = [[symbol**power for power in range(degree + 1)] for symbol, degree in degrees.items()]
    return [sympy.prod(factors) for factors in product(*powers)]


def formulas_of(steps: Sequence[tuple[Point, Step]], lengths: Terms, holds: str) -> dict[str, Formula]:
    """By name, the counts of a step that have a formula: bytes, messages, FLOPs and memory traffic, each direction.

    Args:
        steps: of the same model and strategy, at several lengths and numbers of ranks: more than there are terms, two
            times as many as ``lengths``. Points have N, or R and U: the ranks of the outer mesh dim, and of the inner.
        lengths: the terms in S, B and whatever else differs between the steps.
        holds: for what lengths and ranks, in words.
    """
    at = tuple(point for point, _ in steps)
    ranks = (N,) if N in at[0] else (R, U)
    all_ranks = sympy.prod(ranks)
    found: dict[str, Formula] = {}

    def add(name: str, expression: sympy.Expr | None) -> None:
        if expression is not None:
            found[name] = Formula(expression, holds, at)

    for direction in ("forward", "backward"):
        add(f"{direction} bytes", _sum(_bytes(steps, lengths, ranks, direction)))
        numbers = [(point, step.messages(direction)) for point, step in steps]
        add(f"{direction} messages", fitted([sympy.Integer(1), *ranks], numbers))
        shared = [term / n for term in lengths for n in (sympy.Integer(1), all_ranks)]
        add(f"{direction} FLOPs", fitted(shared, [(point, step.flops(direction)) for point, step in steps]))
        moved = [(point, _traffic(step.of(direction))) for point, step in steps]
        add(f"{direction} traffic", fitted(shared, moved))
    return found


def _traffic(works: Iterable[Work]) -> int:
    return sum(work.traffic * work.copies for work in works)


def _sum(parts: Iterable[sympy.Expr | None]) -> sympy.Expr | None:
    """None if a part is."""
    parts = list(parts)
    return None if None in parts else sympy.factor_terms(sympy.Add(*parts))


def _bytes(
    steps: Sequence[tuple[Point, Step]], lengths: Terms, ranks: tuple[sympy.Symbol, ...], direction: str
) -> Iterable[sympy.Expr | None]:
    """The bytes of every kind of collective over every mesh dim."""
    sent = [(point, bytes_by_kind(step, direction)) for point, step in steps]
    for kind, over in sorted({key for _, by_kind in sent for key in by_kind}):
        counts = [(point, by_kind.get((kind, over), 0)) for point, by_kind in sent]
        # of an all-to-all either share alone first: both together may be more terms than there are counts
        shares = range(len(SHARES[kind]))
        tried = (terms_of(kind, over, lengths, ranks, some) for some in (*([at] for at in shares), shares))
        yield next((found for terms in tried if (found := fitted(terms, counts)) is not None), None)


def terms_of(
    kind: str, over: str, lengths: Terms, ranks: tuple[sympy.Symbol, ...], shares: Sequence[int] | None = None
) -> list[sympy.Expr]:
    """What a collective may send: of tensors that ranks of the other mesh dim divide, or do not.

    ``shares``: which of its :data:`SHARES`; None means all.
    """
    among = {"all": sympy.prod(ranks), "outer": ranks[0], "inner": ranks[-1]}[over]
    others = {sympy.Integer(1), sympy.prod(ranks) / among}
    divided = [length / other for length in lengths for other in sorted(others, key=str)]
    chosen = SHARES[kind] if shares is None else [SHARES[kind][at] for at in shares]
    return [size * share(among) for share in chosen for size in divided]


def bytes_by_kind(step: Step, direction: str) -> dict[tuple[str, str], int]:
    """(kind, mesh dim) -> bytes. The ranks of an inner mesh dim are neighbours; "all" are those of both.

    A hop of a ring of two ranks is one, though it looks like an all-to-all.
    """
    found: dict[tuple[str, str], int] = {}
    for work in step.of(direction):
        if work.kind == "message" and work.message is not None:
            ranks = work.message.ranks
            of_one = "inner" if len(ranks) > 1 and ranks[1] - ranks[0] == 1 else "outer"
            over = "all" if len(ranks) == step.world_size else of_one
            key = (work.message.kind if work.ring is None else "send_recv", over)
            found[key] = found.get(key, 0) + work.message.bytes_sent * work.copies
    return found
