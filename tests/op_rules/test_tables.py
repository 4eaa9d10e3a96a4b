"""The tables as a whole, the einsum-like form, and what a rule may not say. Single rules: ``tests/op_rules``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import sympy
import torch

from sptransform.diagnostics.errors import RuleError
from sptransform.op_rules import DEFAULT_RULES, TABLES, attention, creation, pieces, pointwise, redistribute, reduction
from sptransform.rules.decision import Pending, Replicate, Sharded, decision_for
from sptransform.rules.einsum import rule
from sptransform.rules.rule import OpCall, Operand, OpRule, Shape
from sptransform.rules.table import OpEntry, RuleTable
from sptransform.sharding.partition import Partition
from sptransform.sharding.placement import P, R, Shard
from sptransform.sharding.sizes import SymbolicSizeError
from tests.op_rules import (
    test_attention,
    test_below_autograd,
    test_complex_numbers,
    test_convolution,
    test_creation,
    test_indexing,
    test_loss,
    test_matmul,
    test_pieces,
    test_pointwise,
    test_pooling,
    test_redistribute,
    test_reduction,
    test_resampling,
    test_scans,
    test_scatter,
    test_shape,
)
from tests.support.brute_force import Case, call_of, case, check_case, randn

aten = torch.ops.aten

CASES: list[Case] = [
    *test_attention.CASES,
    *test_below_autograd.CASES,
    *test_complex_numbers.CASES,
    *test_convolution.CASES,
    *test_creation.CASES,
    *test_indexing.CASES,
    *test_loss.CASES,
    *test_matmul.CASES,
    *test_pieces.CASES,
    *test_pointwise.CASES,
    *test_pooling.CASES,
    *test_redistribute.CASES,
    *test_reduction.CASES,
    *test_resampling.CASES,
    *test_scatter.CASES,
    *test_scans.CASES,
    *test_shape.CASES,
]


def test_every_overload_has_a_case() -> None:
    tried = {each.target for each in CASES}
    missing = sorted(str(target) for target in DEFAULT_RULES if target not in tried)
    assert not missing, f"no case in tests/op_rules for {', '.join(missing)}"


def test_some_case_of_every_overload_can_be_sharded() -> None:
    """Otherwise the table has a line that only says "run it whole", which is what no line says."""
    counting = {target for target, entry in creation.TABLE if entry is creation.counting}
    sharded = set()
    for each in CASES:
        made, _, _ = call_of(each)
        found = DEFAULT_RULES.rule_of(made)
        if found is not None and found.sizes.keys() - found.replicated:
            sharded.add(each.target)
    never_cut = {aten.all.default, aten.any.default, aten.max.default, aten.min.default, aten.prod.default}
    assert set(DEFAULT_RULES) - sharded == counting | never_cut


@pytest.mark.parametrize("table", TABLES, ids=range(len(TABLES)))
def test_tables_are_alphabetical(table: list[tuple[object, object]]) -> None:
    names = [str(target) for target, _ in table]
    assert names == sorted(names)


def _shardable(form: Callable[[OpCall], OpRule], factor: str) -> Callable[[OpCall], OpRule]:
    """The rule with one factor too many that may be cut, and summed if it leaves the result."""

    def apply(made: OpCall) -> OpRule:
        found = form(made)
        return replace(found, replicated=found.replicated - {factor}, reduce=found.reduce | {factor})

    return apply


def _circling_too(form: Callable[[OpCall], OpRule], factor: str) -> Callable[[OpCall], OpRule]:
    """The rule with a factor that the op is said to pass round."""

    def apply(made: OpCall) -> OpRule:
        return replace(form(made), ring_factors=frozenset({factor}))

    return apply


_QKV = (randn(2, 6, 4, 3), randn(2, 3, 4, 3), randn(2, 3, 4, 3))


@pytest.mark.parametrize(
    ("wrong", "tried"),
    [
        (_shardable(reduction.along_dim, "i1"), case(aten.softmax.int, randn(4, 6), -1)),
        (_shardable(reduction.along_dim, "i1"), case(aten.cumsum.default, randn(4, 6), -1)),
        (_shardable(reduction.norm, "i1"), case(aten.rms_norm.default, randn(4, 6), [6])),
        (_shardable(attention.attention, "t"), case(test_attention.sdpa, *_QKV, enable_gqa=True)),
        (attention.attention, case(test_attention.sdpa, *_QKV, enable_gqa=True)),
        (_circling_too(attention.attention, "t"), case(test_attention.sdpa, *_QKV, enable_gqa=True)),
        (attention.ring_attention, test_attention.RING_CASES[0]),
        (partial(redistribute._passing, moved=(), linear=True), test_redistribute.GATHER),
        (partial(redistribute._passing, moved=(), linear=False), test_redistribute.GATHER),
        (reduction.reduction(summed=True), case(aten.mean.dim, randn(4, 6), [1])),
        (pointwise.pointwise(((0,),)), case(aten.gelu.default, randn(4, 6))),
        (pointwise.pointwise(((0, 1),)), case(aten.mul.Tensor, randn(4, 6), randn(4, 6))),
        (pointwise.pointwise(((0,),)), case(aten.add.Tensor, randn(4, 6), randn(4, 6))),
        (pieces.slice_, case(aten.slice.Tensor, randn(2, 6), 1, 1, 5)),
        (pieces.pad, case(aten.pad.default, randn(2, 6), [1, 1])),
        (
            rule("... k, o k, o -> ... o", reduce="k"),
            case(aten.linear.default, randn(4, 6), randn(5, 6), randn(5)),
        ),
    ],
    ids=lambda x: str(x) if isinstance(x, Case) else "wrong",
)
def test_a_wrong_rule_is_caught(
    wrong: Callable[[OpCall], OpRule], tried: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The brute force itself: a factor too many, a linearity that is not one, a missing local form."""
    check_case(tried)
    monkeypatch.setitem(DEFAULT_RULES._entries, tried.target, OpEntry(wrong))
    with pytest.raises((AssertionError, RuntimeError)):
        check_case(tried)


def test_an_overload_stands_in_one_table() -> None:
    row = (aten.mm.default, rule("i k, k j -> i j", reduce="k"))
    with pytest.raises(RuleError, match=r"two rules for aten\.mm\.default"):
        RuleTable([row], [row])


def test_a_table_of_the_user_comes_first_by_its_default() -> None:
    table = RuleTable([(aten.mm.default, rule("i k, k j -> i j", replicated="k"))], default=DEFAULT_RULES.get)
    made, _, _ = call_of(case(aten.mm.default, randn(2, 3), randn(3, 4)))
    assert table.rule_of(made).replicated == {"k"}
    assert table[aten.bmm.default] is DEFAULT_RULES[aten.bmm.default]
    assert isinstance(table[aten.mm.default], OpEntry)
    with pytest.raises(KeyError):
        table[aten.nonzero.default]


def call(operands: list[Shape], results: list[Shape]) -> OpCall:
    """A call of some op with these shapes."""
    return OpCall(aten.mm.default, tuple(map(Operand, range(len(operands)))), {}, tuple(operands), tuple(results))


def checked(form: Callable[[OpCall], OpRule], operands: list[Shape], results: list[Shape]) -> OpRule:
    made = call(operands, results)
    return form(made).check(made)


@pytest.mark.parametrize(
    ("text", "named", "message"),
    [
        ("i k, k j", {}, "form 'operands -> results'"),
        ("i k -> i", {"reduce": "k n"}, "has no factor n"),
        ("i k -> i", {"replicated": "kk"}, "has no factor kk"),
        ("i i -> i", {}, "names a factor twice"),
        ("(b s) v -> (b s s) v", {}, "names a factor twice"),
    ],
)
def test_a_rule_that_cannot_be_read(text: str, named: dict[str, str], message: str) -> None:
    with pytest.raises(RuleError, match=message):
        rule(text, **named)


@pytest.mark.parametrize(
    ("text", "operands", "results", "message"),
    [
        ("i k, k j -> i j", [(2, 3), (4, 5)], [(2, 5)], r"dim 0 of operand 1 is 4"),
        ("i k, k j -> i j", [(2, 3), (3, 5)], [(2, 6)], r"dim 1 of result 0 is 6"),
        ("i k, k j -> i j", [(2, 3, 4), (3, 5)], [(2, 5)], r"does not fit a tensor of shape \(2, 3, 4\)"),
        ("... i j -> ... i", [(2,)], [(2,)], "does not fit"),
        ("i, i -> i", [(2,), (2,), (2,)], [(2,)], "too few operands"),
        ("i, i -> i", [(2,)], [(2,)], None),
        ("(a b) -> (a b)", [(6,)], [(6,)], "do not say the size of a, b"),
        ("b s v -> (b s) v", [(2, 4, 3)], [(9, 3)], r"dim 0 of result 0 is 9"),
        ("i k -> i", [(2, 3)], [(2,)], "k leaves a result, and is in neither reduce nor replicated"),
        ("i j -> i, j", [(2, 3)], [(2,), (3,)], "i, j leaves a result"),
    ],
)
def test_a_rule_that_does_not_fit(text: str, operands: list[Shape], results: list[Shape], message: str | None) -> None:
    form = rule(text, reduce="k" if text.startswith("i k,") else "")
    if message is None:
        checked(form, operands, results)
        return
    with pytest.raises(RuleError, match=message):
        checked(form, operands, results)


def test_a_rule_must_describe_every_tensor() -> None:
    with pytest.raises(RuleError, match="1 operands and 1 results"):
        OpRule(((("i",),),), ((("i",),),), {"i": 2}).check(call([(2,), (2,)], [(2,)]))
    with pytest.raises(RuleError, match="operand 0 has 2 dims, its rule 1"):
        OpRule(((("i",),),), ((("i",),),), {"i": 2}).check(call([(2, 2)], [(2,)]))


def test_compound_factors() -> None:
    found = checked(rule("b s v -> (b s) v"), [(2, 4, 3)], [(8, 3)])
    assert dict(found.sizes) == {"b": 2, "s": 4, "v": 3}
    assert found.results == ((("b", "s"), ("v",)),)
    # with one batch, the flattened dimension is the sequence
    found = checked(rule("b s v -> (b s) v"), [(1, 4, 3)], [(4, 3)])
    assert found.sizes["b"] == 1 and found.operands[0][0] == ()


def test_ellipsis_aligns_from_the_right() -> None:
    found = checked(rule("..., ... -> ..."), [(4, 1), (3, 1, 5)], [(3, 4, 5)])
    assert found.operands == (((".2",), ()), ((".3",), (), (".1",)))
    assert found.results == (((".3",), (".2",), (".1",)),)


def test_decisions_of_a_product() -> None:
    found = checked(rule("i k, k j -> i j", reduce="k", linear=((0,), (1,))), [(4, 6), (6, 2)], [(4, 2)])
    rows, inner = Sharded("i", Partition.contiguous(4, 2)), Sharded("k", Partition.contiguous(6, 2))
    assert rows.demands(found, 2) == (Shard(0, rows.partition), R)
    assert rows.outcomes(found, 1) == (Shard(0, rows.partition),)
    assert inner.demands(found, 2) == (Shard(1, inner.partition), Shard(0, inner.partition))
    assert inner.outcomes(found, 1) == (P,)
    pending = Pending(frozenset({0}))
    assert (pending.demands(found, 2), pending.outcomes(found, 1)) == ((P, R), (P,))
    assert (Replicate(R).demands(None, 2), Replicate(R).outcomes(None, 1)) == ((R, R), (R,))


def test_decisions_of_a_flattened_sequence() -> None:
    found = checked(rule("b s v -> (b s) v"), [(2, 4, 3)], [(8, 3)])
    cut = Partition.contiguous(4, 2)
    flat = Shard(0, cut, outer=2)
    assert Sharded("s", cut).outcomes(found, 1) == (flat,)
    assert decision_for(found, found.results[0], flat) == Sharded("s", cut)
    # whole rows of the batch
    assert decision_for(found, found.results[0], Shard(0, Partition.contiguous(8, 2))) == Sharded(
        "b", Partition.contiguous(2, 2)
    )
    # a cut through both: no factor does it
    assert decision_for(found, found.results[0], Shard(0, Partition.of(8, [[(0, 3)], [(3, 8)]]))) is None
    whole = OpRule(found.operands, found.results, found.sizes, replicated=frozenset({"s", "b", "v"}))
    assert decision_for(whole, whole.results[0], flat) is None


def test_arguments_by_name() -> None:
    made = OpCall(aten.addmm.default, (Operand(0), Operand(1), Operand(2)), {"beta": 2}, ((3,), (2, 4), (4, 3)), ())
    assert made.argument("beta") == 2 and made.argument("alpha") == 1
    assert made.operand("mat2") == 2 and made.operand("self") == 0
    with pytest.raises(RuleError, match="no argument 'gamma'"):
        made.argument("gamma")


def test_sizes_that_are_not_known_to_be_equal_are_no_fault_of_the_rule() -> None:
    """As the rows of two inputs whose lengths are open: the graph is captured again, for the lengths at hand."""
    some, other = (sympy.Symbol(name, integer=True, positive=True) for name in ("k", "n"))
    call = OpCall(aten.mm.default, (Operand(0), Operand(1)), {}, ((4, 2 * some), (2 * other, 3)), ((4, 3),))
    with pytest.raises(SymbolicSizeError, match="not known to be one size"):
        DEFAULT_RULES.rule_of(call)
