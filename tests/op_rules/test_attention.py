"""Attention: heads, batch, queries and value width can be cut; keys and the contracted width stay whole, or circle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import sptransform.ops  # noqa: F401 - registers the library's own attention
from sptransform.op_rules import DEFAULT_RULES
from tests.support.brute_force import OUTER, Case, booleans, call_of, case, check_case, ids, integers, randn, rule_for

aten = torch.ops.aten
sdpa = aten.scaled_dot_product_attention.default
attention = torch.ops.sptransform.attention.default
ring = torch.ops.sptransform.ring_attention.default


def mask(*shape: int) -> torch.Tensor:
    """A boolean mask in which every query sees a key."""
    seen = booleans(*shape)
    seen[..., 0] = True
    return seen


def qkv(batch: int, heads: int, key_heads: int, queries: int, keys: int, width: int = 3, value_width: int = 3):
    return (
        randn(batch, heads, queries, width),
        randn(batch, key_heads, keys, width),
        randn(batch, key_heads, keys, value_width),
    )


# a chance so small that no entry is dropped, for the branch that draws a mask of its own
_NEVER = 1e-13

CASES = [
    case(sdpa, *qkv(2, 4, 4, 5, 5), factors="b h s e"),
    case(sdpa, *qkv(2, 4, 4, 5, 5), None, 0.0, True, factors="b h e"),
    case(sdpa, *qkv(2, 4, 4, 5, 7, value_width=2), scale=0.3),
    case(sdpa, *qkv(2, 4, 4, 5, 7), mask(5, 7), factors="b h s e"),
    case(sdpa, *qkv(2, 4, 4, 5, 7), mask(2, 1, 5, 7)),
    case(sdpa, *qkv(2, 4, 4, 5, 7), mask(2, 1, 1, 7)),
    case(sdpa, *qkv(2, 4, 4, 5, 7), randn(4, 5, 7)),
    case(sdpa, *qkv(2, 4, 4, 5, 7), randn(1, 4, 5, 7)),
    case(sdpa, *qkv(1, 3, 3, 1, 6), factors="h e"),
    case(sdpa, *qkv(2, 1, 1, 4, 4), factors="b s e"),
    case(sdpa, *qkv(2, 4, 2, 5, 5), None, 0.0, True, enable_gqa=True, factors="b h e"),
    case(sdpa, *qkv(2, 6, 2, 4, 5), mask(4, 5), enable_gqa=True, factors="b h s e"),
    case(sdpa, *qkv(1, 6, 3, 4, 5), randn(1, 6, 4, 5), enable_gqa=True),
    case(sdpa, *qkv(2, 4, 1, 4, 5), enable_gqa=True, factors="b h s e"),
    case(sdpa, *qkv(1, 9, 3, 2, 3), enable_gqa=True),
    case(sdpa, *qkv(2, 2, 2, 4, 4), None, _NEVER, False, factors="b h s e"),
    case(sdpa, *qkv(2, 4, 2, 4, 4), None, _NEVER, True, enable_gqa=True, scale=0.4),
    case(sdpa, *qkv(2, 4, 4, 4, 4), mask(2, 1, 4, 4), _NEVER),
    case(sdpa, *qkv(2, 4, 4, 4, 4), randn(4, 4), _NEVER),
    case(attention, *qkv(2, 4, 2, 5, 5), None, 0.0, True, key_head_of=[0, 0, 1, 1], factors="b h e"),
    case(attention, *qkv(2, 6, 2, 4, 5), mask(2, 1, 4, 5), 0.0, False, key_head_of=[0, 0, 0, 1, 1, 1], scale=0.3),
    case(attention, *qkv(1, 9, 3, 2, 3), None, 0.0, False, key_head_of=[0, 0, 0, 1, 1, 1, 2, 2, 2]),
    case(attention, *qkv(2, 4, 1, 4, 5), randn(4, 5), 0.0, False, key_head_of=[0, 0, 0, 0]),
    case(attention, *qkv(2, 3, 3, 4, 5), None, 0.0, False, factors="b h s e"),
    case(attention, *qkv(2, 4, 2, 5, 5), None, 0.0, True, randn(4), softcap=0.8, key_head_of=[0, 0, 1, 1]),
    case(attention, *qkv(2, 6, 2, 4, 5), mask(4, 5), 0.0, False, randn(6), key_head_of=[0, 0, 0, 1, 1, 1]),
    case(attention, *qkv(2, 3, 3, 4, 5), None, 0.0, False, softcap=0.8, factors="b h s e"),
    case(attention, *qkv(2, 4, 4, 4, 4), None, _NEVER, False, randn(4), softcap=0.8, factors="b h s e"),
    case(attention, *qkv(2, 1, 1, 4, 5), mask(2, 1, 4, 5), 0.0, False, randn(1), factors="b s e"),
    # keys that all batches share
    case(sdpa, randn(2, 2, 4, 3), randn(1, 2, 5, 3), randn(1, 2, 5, 3), factors="b h s e"),
    case(ring, *qkv(2, 4, 4, 5, 5), [], [], nearest=0, factors="b h s"),
    case(ring, *qkv(1, 4, 2, 6, 6, value_width=2), [], [], nearest=0, farthest=2, scale=0.3, factors="h s"),
    case(ring, *qkv(2, 2, 1, 4, 7), [], [], factors="b h s"),
    # queries that see only what comes later, the last ones nothing
    case(ring, *qkv(1, 2, 2, 6, 5), [], [], farthest=-1, factors="h s"),
    # documents packed into one sequence
    case(
        ring,
        *qkv(2, 4, 2, 6, 6),
        [integers(3, 2, 1, 6, 1)],
        [integers(3, 2, 1, 1, 6)],
        mask="%2 = eq.Tensor(%0, %1)",
        nearest=0,
        factors="b h s",
    ),
    # padding that leaves rows without keys
    case(ring, *qkv(2, 4, 4, 5, 5), [], [booleans(2, 1, 1, 5)], mask="%0", nearest=0, factors="b h s"),
    # numbers for each head, added to the scores; a mask without a batch
    case(ring, *qkv(2, 4, 4, 4, 5), [randn(4, 4, 5)], [], mask="%0", factors="b h s"),
    case(ring, *qkv(2, 4, 1, 4, 4), [mask(4, 4)], [booleans(4)], mask="%2 = logical_or(%0, %1)", factors="b h s"),
    case(ring, *qkv(1, 6, 3, 4, 4), [], [], nearest=0, key_head_of=[0, 0, 1, 1, 2, 2], factors="h s"),
    case(ring, *qkv(2, 3, 3, 1, 6), [], [booleans(2, 1, 1, 6)], mask="%0", factors="b h"),
    case(ring, *qkv(2, 4, 2, 5, 5), [], [], randn(4), nearest=0, softcap=0.8, factors="b h s"),
    case(ring, *qkv(1, 6, 3, 4, 4), [], [booleans(1, 1, 1, 4)], randn(6), mask="%0", factors="h s"),
    case(ring, *qkv(2, 1, 1, 4, 5), [], [], sinks=randn(1), farthest=-1, factors="b s"),
    case(ring, *qkv(2, 4, 4, 5, 5), [mask(2, 1, 5, 1)], [], mask="%0", softcap=0.8, factors="b h s"),
    # a learned bias: of tables, one for all heads and one for each, of numbers of queries and of keys
    case(
        ring,
        *qkv(2, 4, 2, 5, 5),
        [integers(3, 5, 1), randn(2, 1, 5, 1)],
        [integers(3, 1, 5), randn(4, 1, 5)],
        None,
        [randn(4, 5), randn(1, 5)],
        mask="%6 = add.Tensor(%0, %2); %7 = lookup(%4, %6); %8 = lookup(%5, %6); %9 = mul.Tensor(%7, %1); "
        "%10 = add.Tensor(%9, %8); %11 = add.Tensor(%10, %3)",
        nearest=0,
        factors="b h s",
    ),
    case(
        ring,
        *qkv(1, 2, 2, 4, 4),
        [integers(3, 4, 4)],
        [],
        randn(2),
        [randn(2, 3)],
        mask="%2 = lookup(%1, %0)",
        softcap=0.8,
        factors="h s",
    ),
    # cut along queries before, and in a ring of two: along heads and batch only
    replace(
        case(ring, *qkv(2, 4, 2, 4, 8), [], [], nearest=0, queries="8/2z", group_name=OUTER, factors="b h"), outer=2
    ),
    replace(
        case(
            ring,
            *qkv(2, 4, 2, 4, 8),
            [],
            [],
            randn(4),
            nearest=0,
            softcap=0.8,
            queries="8/2z",
            group_name=OUTER,
            factors="b h",
        ),
        outer=2,
    ),
    replace(
        case(
            ring,
            *qkv(2, 4, 2, 3, 3),
            [],
            [],
            farthest=1,
            queries="6/2",
            keys="6[0:1,4:6|1:4]",
            group_name=OUTER,
            factors="b h",
        ),
        outer=2,
    ),
]
RING_CASES = [case for case in CASES if case.target is ring]


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_rule(case: Case) -> None:
    check_case(case)


NO_RULE = [
    case(sdpa, randn(1, 2, 4, 3), randn(2, 2, 5, 3), randn(2, 2, 5, 3)),
    case(sdpa, randn(2, 4, 3), randn(2, 5, 3), randn(2, 5, 3)),
    case(attention, *qkv(1, 4, 2, 4, 5), None, 0.0, False, key_head_of=[0, 1, 0, 1]),
    case(ring, *qkv(1, 4, 2, 4, 5), [], [], key_head_of=[0, 1, 0, 1]),
]


@pytest.mark.parametrize("case", NO_RULE, ids=ids(NO_RULE))
def test_no_rule(case: Case) -> None:
    call, _, _ = call_of(case)
    assert DEFAULT_RULES.rule_of(call) is None


@pytest.mark.parametrize("case", [CASES[0], CASES[10], CASES[19], RING_CASES[0]], ids=str)
def test_roles(case: Case) -> None:
    _, rule = rule_for(case)
    assert dict(rule.roles) == {"heads": "h", "queries": "s", "keys": "t", "batch": "b"}
    assert rule.heavy


def test_keys_circle_in_rings_that_have_them_whole() -> None:
    circling = [rule_for(case)[1].ring_factors for case in CASES]
    is_whole = [case.target is ring and "group_name" not in case.kwargs for case in CASES]
    assert circling == [frozenset("t" if whole else "") for whole in is_whole]


def test_a_ring_is_causal_where_later_queries_see_more() -> None:
    bands = [{}, {"nearest": 0}, {"farthest": 0}, {"nearest": 0, "farthest": 3}, {"nearest": -3, "farthest": 3}]
    made = [case(ring, *qkv(1, 2, 2, 4, 4), [], [], **band) for band in bands]
    assert [rule_for(each)[1].is_causal for each in made] == [False, True, False, True, False]
