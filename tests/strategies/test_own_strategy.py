"""A strategy of the user's that only places: one class, passed as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest

import sptransform
from sptransform import Decision, MegatronSP, OpRule, Partition, Sharded, Strategy, UsageError
from sptransform.compiler.backend import settings
from sptransform.compiler.options import Options
from sptransform.engine.strategy import Divide
from sptransform.sharding.mesh import Mesh
from sptransform.sharding.sizes import Size
from tests.support.equality import assert_equal_to_one_device, run_one_device
from tests.support.golden import Golden
from tests.support.rewritten import Asked, on_pretended_ranks
from tests.support.tiny import attention_with_loss, token_inputs


class QueriesStay(Strategy):
    """Each rank attends with its own queries to all keys."""

    reads_masks: ClassVar[bool] = True

    def place_attention(self, rule: OpRule, num_ranks: int, divide: Divide) -> Decision:
        queries = rule.roles["queries"]
        return Sharded(queries, divide(queries))


class LastRankIdles(Strategy):
    """Heads over all ranks but the last: any partition is exact."""

    def place_attention(self, rule: OpRule, num_ranks: int, divide: Divide) -> Decision:
        heads = rule.roles["heads"]
        busy = Partition.contiguous(rule.sizes[heads], num_ranks - 1)
        return Sharded(heads, Partition.of(busy.size, (*busy.owned, [])))


@pytest.mark.parametrize(
    "asked",
    [
        Asked(2, QueriesStay()),
        Asked(3, QueriesStay()),
        Asked(3, LastRankIdles()),
        Asked((2, 2), (QueriesStay(), "megatron")),
    ],
    ids=str,
)
def test_it_is_exact(asked: Asked) -> None:
    model = attention_with_loss()
    reference = run_one_device(model, token_inputs())
    for ranks in on_pretended_ranks(attention_with_loss(), token_inputs(), [asked]).values():
        for result in ranks.results():
            assert_equal_to_one_device(reference, result, 1e-12)


def test_it_is_shown_by_its_name_and_fields() -> None:
    class Halves(QueriesStay):
        def __init__(self, at: int) -> None:
            self.at = at

    assert str(Halves(3)) == "Halves(at=3)"
    page = sptransform.explain(attention_with_loss(), Halves(3), token_inputs(), world_size=2)
    assert page.strategy == "Halves(at=3)"


def test_ranks_compare_its_code() -> None:
    def line(place: Callable[..., Decision]) -> str:
        kind = type("Mine", (Strategy,), {"place_attention": place})
        (found,) = [
            x.text for x in settings(Options(strategy=kind()), Mesh.pretended(2), "") if x.text.startswith("strategy")
        ]
        return found

    assert line(QueriesStay.place_attention) == line(QueriesStay.place_attention)
    assert line(QueriesStay.place_attention) != line(LastRankIdles.place_attention)
    assert " at 0x" not in line(QueriesStay.place_attention)


class ForgetsMasks(QueriesStay):
    reads_masks: ClassVar[bool] = False


def test_a_decision_that_the_op_cannot_run_is_named(golden: Golden) -> None:
    with pytest.raises(UsageError) as error:
        sptransform.rewrite(attention_with_loss(), ForgetsMasks(), token_inputs(), world_size=2)
    golden.check("own_strategy_cannot_run", message=str(error.value))


class Overlapping(QueriesStay):
    def partition(self, size: Size, num_ranks: int, is_causal: bool) -> Partition:
        return Partition.of(size, [[(0, size)]] * num_ranks)


class OneTooMany(QueriesStay):
    def place_attention(self, rule: OpRule, num_ranks: int, divide: Divide) -> Decision:
        queries = rule.roles["queries"]
        return Sharded(queries, Partition.contiguous(rule.sizes[queries], num_ranks + 1))


class ByRole(QueriesStay):
    def place_attention(self, rule: OpRule, num_ranks: int, divide: Divide) -> Decision:
        return Sharded("queries", divide(rule.roles["queries"]))


class OnlyAPartition(QueriesStay):
    def place_attention(self, rule: OpRule, num_ranks: int, divide: Divide) -> Decision:
        return divide(rule.roles["queries"])  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (Overlapping(), "an index has no owner, or several"),
        (OneTooMany(), "by no decision for 2 ranks"),
        (ByRole(), "by no decision for 2 ranks"),
        (OnlyAPartition(), "by no decision for 2 ranks"),
        (QueriesStay, r"fix: QueriesStay\(\.\.\)"),
        (Strategy(), "no method place_attention"),
    ],
    ids=str,
)
def test_what_is_no_strategy_is_refused(strategy: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sptransform.rewrite(attention_with_loss(), strategy, token_inputs(), world_size=2)


class TwoDims(QueriesStay):
    max_mesh_dims: ClassVar[int] = 2


@pytest.mark.parametrize(
    "pair", [("megatron", QueriesStay()), (QueriesStay(), QueriesStay()), (TwoDims(), "megatron"), (MegatronSP(),) * 2]
)
def test_what_does_not_go_together(pair: tuple[object, object]) -> None:
    with pytest.raises(UsageError, match="do not go together"):
        sptransform.rewrite(attention_with_loss(), pair, token_inputs(), world_size=(2, 2))
