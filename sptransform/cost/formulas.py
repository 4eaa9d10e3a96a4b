"""How counts of a training step depend on lengths and ranks: exact formulas, fitted to counts and checked on more.

With everything even, a rank's part of a tensor is a polynomial in the tokens S and rows B, over the number of ranks.
What a collective sends of the whole tensor is known for each kind (:data:`SHARES`). So a count is a sum of few terms
whose coefficients follow from as many counts, in exact arithmetic. More counts than terms are given, and if one of
them does not agree, there is no formula: none is returned, rather than one that holds at some places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import combinations, product
from operator import and_
from typing import Any

import sympy
from sympy import QQ
from sympy.polys.matrices import DomainMatrix

from sptransform.cost.records import Message, Step, Work

#: tokens of a sequence, rows of a batch, ranks; of two mesh dims, ranks of the outer one and of the inner one
S, B, N = sympy.symbols("S B N", positive=True, integer=True)
R, U = sympy.symbols("R U", positive=True, integer=True)

#: what each of n ranks sends of a tensor, as a share of all of it; of a ring, the tensor is what all hops pass on. In
#: an all-to-all every rank gets its share, or, where heads are fewer than ranks, one that others get too. What has no
#: hops, but is sent to few ranks, puts tokens in order that a zigzag dealt: a rank sends a part of what it has
SHARES: Mapping[str, Sequence[Callable[[Any], Any]]] = {
    "all_gather": [lambda n: (n - 1) / n],
    "all_reduce": [lambda n: 2 * (n - 1) / n],
    "all_to_all": [lambda n: (n - 1) / n**2, lambda n: (n - 1) / n],
    "reduce_scatter": [lambda n: (n - 1) / n],
    "send_recv": [lambda n: (n - 1) / n, lambda n: 1 / n],
}

Point = Mapping[sympy.Symbol, int]
Terms = Sequence[sympy.Expr]
Ranks = tuple[sympy.Expr, ...]  # of each mesh dim


@dataclass(frozen=True)
class Formula:
    """A count as an expression, equal to the count wherever it claims to hold.

    Attributes:
        expression: in :data:`S`, :data:`B`, :data:`N` (or :data:`R`, :data:`U`), and what else was left open.
        holds: where, in words.
        at: the points at which it was counted.
        names: numbers of ranks at which it was counted -> the name that the strategy has there.
    """

    expression: sympy.Expr
    holds: str
    at: tuple[Point, ...] = ()
    names: Mapping[int, str] = field(default_factory=dict)

    def value(self, point: Point) -> sympy.Rational:
        """The count at a point."""
        return sympy.nsimplify(self.expression.subs(dict(point)))


def fitted(terms: Terms, counts: Sequence[tuple[Point, int]]) -> sympy.Expr | None:
    """The sum of multiples of ``terms`` that equals all ``counts``; None if there is none, or more than one.

    Only what the counts decide is claimed: with as many terms as counts nothing would be checked, so that is None too.
    """
    rows = [[sympy.sympify(term).subs(dict(point)) for term in terms] for point, _ in counts]
    found = solved(rows, [count for _, count in counts])
    return None if found is None else sympy.factor_terms(sum(c * term for c, term in zip(found, terms, strict=True)))


def solved(rows: Sequence[Sequence[Any]], values: Sequence[Any]) -> list[sympy.Rational] | None:
    """The one solution of linear equations with rational coefficients, of which there are more than unknowns."""
    unknowns = len(rows[0])
    if len(rows) <= unknowns:
        return None
    given = [[QQ.from_sympy(sympy.sympify(x)) for x in (*row, value)] for row, value in zip(rows, values, strict=True)]
    reduced, pivots = DomainMatrix(given, (len(rows), unknowns + 1), QQ).rref()
    if pivots != tuple(range(unknowns)):
        return None
    return [QQ.to_sympy(reduced[row, unknowns].element) for row in range(unknowns)]


def polynomials(degrees: Mapping[sympy.Symbol, int]) -> list[sympy.Expr]:
    """Every product of powers up to these degrees, 1 among them."""
    powers = [[symbol**power for power in range(degree + 1)] for symbol, degree in degrees.items()]
    return [sympy.prod(factors) for factors in product(*powers)]


def formulas_of(
    steps: Sequence[tuple[Point, Step]],
    lengths: Terms,
    holds: str,
    *,
    ranks: Ranks | None = None,
    work: Sequence[Terms] | None = None,
) -> dict[str, Formula]:
    """By name, the counts of a step that have a formula: bytes, messages, FLOPs and memory traffic, each direction.

    Args:
        steps: of the same model and strategy, at several lengths and numbers of ranks: more than there are terms, two
            times as many as ``lengths``. Points have N, or R and U: the ranks of the outer mesh dim, and of the inner.
        lengths: the terms in S, B and whatever else differs between the steps.
        holds: for what lengths and ranks, in words.
        ranks: those of each mesh dim in the symbols of the points, as ``(N / 8, 8)``. Default: what the points have.
        work: terms for FLOPs instead of ``lengths``; of several lists, the first one that has a formula.
    """
    at = tuple(point for point, _ in steps)
    ranks = ranks or ((N,) if N in at[0] else (R, U))
    found: dict[str, Formula] = {}

    def add(name: str, expression: sympy.Expr | None) -> None:
        if expression is not None:
            found[name] = Formula(expression, holds, at)

    for direction in ("forward", "backward"):
        add(f"{direction} bytes", _sum(_bytes(steps, lengths, ranks, direction)))
        numbers = [(point, step.messages(direction)) for point, step in steps]
        add(f"{direction} messages", fitted([sympy.Integer(1), *_open(ranks)], numbers))
        flops = [(point, step.flops(direction)) for point, step in steps]
        tried = (terms for each in work or [lengths] for terms in _shared(each, ranks))
        add(f"{direction} FLOPs", first_fitted(flops, tried))
        moved = [(point, _traffic(step.of(direction))) for point, step in steps]
        add(f"{direction} traffic", first_fitted(moved, _shared(lengths, ranks)))
    return found


def first_fitted(counts: Sequence[tuple[Point, int]], tried: Iterable[Terms]) -> sympy.Expr | None:
    """The formula of the first terms that have one: few first, since all at once may be more than there are counts."""
    return next((found for terms in tried if (found := fitted(terms, counts)) is not None), None)


def _open(ranks: Ranks) -> list[sympy.Expr]:
    return [n for n in ranks if not n.is_number]


def _shared(lengths: Terms, ranks: Ranks) -> Iterator[Terms]:
    """What all ranks share, then also what each does whole, or shares with the ranks once more."""
    n = sympy.prod(ranks)
    for parts in ([1 / n], [1 / n, sympy.Integer(1)], [1 / n, 1 / n**2], [1 / n, 1 / n**2, sympy.Integer(1)]):
        yield [length * part for length in lengths for part in parts]


def _traffic(works: Iterable[Work]) -> int:
    return sum(work.traffic * work.copies for work in works)


def _sum(parts: Iterable[sympy.Expr | None]) -> sympy.Expr | None:
    """None if a part is."""
    parts = list(parts)
    return None if None in parts else sympy.factor_terms(sympy.Add(*parts))


def _bytes(
    steps: Sequence[tuple[Point, Step]], lengths: Terms, ranks: Ranks, direction: str
) -> Iterator[sympy.Expr | None]:
    """The bytes of every kind of collective over every mesh dim."""
    sent = [(point, bytes_by_kind(step, direction)) for point, step in steps]
    reduced = [(point, tensors_reduced(step, direction)) for point, step in steps]
    for kind, over in sorted({key for _, by_kind in sent for key in by_kind}):
        among = _among(over, ranks)
        counts = [(point, by_kind.get((kind, over), 0)) for point, by_kind in sent]
        if kind == "all_reduce":
            fixed = fixed_all_reduces([(point, tensors.get(over, Counter())) for point, tensors in reduced], among)
            yield fixed
            counts = [(point, count - fixed.subs(dict(point))) for point, count in counts]
        if any(count for _, count in counts):
            shares = range(len(SHARES[kind]))
            tried = (*([at] for at in shares), *combinations(shares, 2)) if not among.is_number else ([0],)
            yield first_fitted(counts, (t for some in tried for t in terms_of(kind, over, lengths, ranks, some)))


def _among(over: str, ranks: Ranks) -> sympy.Expr:
    return {"all": sympy.prod(ranks), "outer": ranks[0], "inner": ranks[-1]}[over]


def terms_of(
    kind: str, over: str, lengths: Terms, ranks: Ranks, shares: Sequence[int] = (0,)
) -> Iterator[list[sympy.Expr]]:
    """What a collective may send: of tensors that ranks of the other mesh dim divide; that they do not; or of both.

    ``shares``: which of its :data:`SHARES`.
    """
    among = _among(over, ranks)
    others = sympy.prod(ranks) / among
    for divisors in ([1],) if others.is_number else ([others], [1], [others, 1]):
        yield [
            length / each * SHARES[kind][at](among) for at in shares for length in lengths for each in divisors
        ]


def fixed_all_reduces(tensors: Sequence[tuple[Point, Counter[int]]], among: sympy.Expr) -> sympy.Expr:
    """The bytes of all-reduces whose tensors are the same at all points, such as a loss and gradients of parameters.

    Where ranks do not divide what they send of a tensor, the count of its bytes is rounded down, and so is the formula.
    """
    alike = reduce(and_, (found for _, found in tensors))
    at = [among.subs(dict(point)) for point, _ in tensors]
    share = 2 * (among - 1) / among
    terms = []
    for size, number in sorted(alike.items()):
        is_whole = all(2 * size % n == 0 for n in at)
        terms.append(number * (size * share if is_whole else sympy.floor(size * share)))
    return sympy.factor_terms(sympy.Add(*terms))


def tensors_reduced(step: Step, direction: str) -> dict[str, Counter[int]]:
    """Of the all-reduces over each mesh dim, how many tensors of how many bytes they sum."""
    found: dict[str, Counter[int]] = {}
    for work in step.of(direction):
        message = work.message
        if work.kind == "message" and message is not None and message.kind == "all_reduce":
            # what is sent grows with the tensor, so that the smallest one that sends so much is the tensor
            n = len(message.ranks)
            size = -(-message.bytes_sent * n // (2 * (n - 1))) if n > 1 else 0
            found.setdefault(over_of(message, step), Counter())[size] += work.copies
    return found


def over_of(message: Message, step: Step) -> str:
    """ "all", or the mesh dim that a message goes over: the ranks of an inner one are neighbours."""
    if len(message.ranks) == step.world_size:
        return "all"
    return "inner" if len(message.ranks) > 1 and message.ranks[1] - message.ranks[0] == 1 else "outer"


def bytes_by_kind(step: Step, direction: str) -> dict[tuple[str, str], int]:
    """(kind, mesh dim) -> bytes. A hop of a ring of two ranks is one, though it looks like an all-to-all."""
    found: dict[tuple[str, str], int] = {}
    for work in step.of(direction):
        if work.kind == "message" and work.message is not None:
            key = (work.message.kind if work.ring is None else "send_recv", over_of(work.message, step))
            found[key] = found.get(key, 0) + work.message.bytes_sent * work.copies
    return found
