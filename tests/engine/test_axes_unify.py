"""Unification of products of atoms: what two shapes of one dimension have in common."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sptransform.engine.axes import Atom, resolve, unify

fast = settings(deadline=None, derandomize=True, max_examples=200)


def atoms(*sizes: int) -> list[Atom]:
    return [Atom(size) for size in sizes]


def sizes_of(found: list[Atom]) -> list[int]:
    return [atom.size for atom in resolve(found)]


def bounds_of(sizes: list[int]) -> set[int]:
    return {prod(sizes[:i]) for i in range(len(sizes) + 1)}


@st.composite
def products(draw: st.DrawFn, total: int) -> list[int]:
    """Sizes above 1 whose product is ``total``."""
    sizes = []
    while total > 1:
        sizes.append(draw(st.sampled_from([n for n in range(2, total + 1) if total % n == 0])))
        total //= sizes[-1]
    return sizes


_totals = st.sampled_from([2, 4, 6, 12, 16, 24, 36, 60])
_pairs = _totals.flatmap(lambda total: st.tuples(products(total), products(total)))
_many = _totals.flatmap(lambda total: st.lists(products(total), min_size=2, max_size=5))


@pytest.mark.parametrize(
    ("left", "right", "common"),
    [
        ([8], [8], [8]),
        ([2, 64], [128], [2, 64]),
        ([128], [2, 64], [2, 64]),
        ([2, 6], [6, 2], [2, 3, 2]),
        ([2, 64], [4, 32], [2, 2, 32]),
        ([], [], []),
    ],
)
def test_unify(left: list[int], right: list[int], common: list[int]) -> None:
    a, b = atoms(*left), atoms(*right)
    assert unify(a, b)
    assert resolve(a) == resolve(b)
    assert sizes_of(a) == common


def test_what_does_not_nest_stays_apart_from_there_on() -> None:
    a, b = atoms(5, 4, 3), atoms(5, 6, 2)
    assert not unify(a, b)
    assert resolve(a)[0] is resolve(b)[0]
    assert set(resolve(a)[1:]).isdisjoint(resolve(b)[1:])
    assert sizes_of(a) == [5, 4, 3] and sizes_of(b) == [5, 6, 2]


def test_a_split_reaches_everything_merged_before() -> None:
    """``[B*S] == [B*S]``, and only then ``[B*S] == [B, S]``."""
    (first,), (second,), (batch, sequence) = atoms(12), atoms(12), atoms(3, 4)
    assert unify([first], [second])
    assert unify([second], [batch, sequence])
    assert resolve([first]) == resolve([batch, sequence])


def test_an_axis_used_twice_stays_one() -> None:
    """Queries and keys of self-attention: both dimensions of the scores are the sequence."""
    (sequence,), (rows,), (columns,) = atoms(8), atoms(8), atoms(8)
    assert unify([sequence], [rows]) and unify([sequence], [columns])
    assert unify([rows, columns], [sequence, sequence])
    assert len(set(resolve([sequence, rows, columns]))) == 1
    halves = atoms(2, 4)
    assert unify([rows], halves)
    assert resolve([columns]) == resolve(halves)


def test_a_product_with_itself() -> None:
    a = atoms(4, 6)
    assert unify(a, a)
    assert sizes_of(a) == [4, 6]


@fast
@given(_pairs)
def test_two_products_unify_where_their_bounds_nest(pair: tuple[list[int], list[int]]) -> None:
    left, right = pair
    bounds = sorted(bounds_of(left) | bounds_of(right))
    a, b = atoms(*left), atoms(*right)
    unified = unify(a, b)
    assert unified == all(hi % lo == 0 for lo, hi in pairwise(bounds))
    if unified:
        assert resolve(a) == resolve(b)
        assert bounds_of(sizes_of(a)) == set(bounds)
    assert prod(sizes_of(a)) == prod(sizes_of(b)) == prod(left)


@fast
@given(_many, st.data())
def test_what_was_unified_stays_so(many: list[list[int]], data: st.DataObject) -> None:
    """In any order, with refusals between: equal products stay equal, and keep their size."""
    made = [atoms(*sizes) for sizes in many]
    equal: list[tuple[int, int]] = []
    for _ in range(2 * len(made)):
        i, j = data.draw(st.tuples(*[st.integers(0, len(made) - 1)] * 2))
        if unify(made[i], made[j]):
            equal.append((i, j))
        for a, b in equal:
            assert resolve(made[a]) == resolve(made[b])
        for sizes, own in zip(many, made, strict=True):
            assert prod(sizes_of(own)) == prod(sizes)
            assert bounds_of(sizes) <= bounds_of(sizes_of(own))
