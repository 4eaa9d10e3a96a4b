"""Every shape: lengths, heads and batches that the ranks do not share evenly are exact, and send what is explained."""

import itertools

import pytest

from sptransform import Ulysses
from tests.inspection.test_explain import Sent, sent
from tests.support.equality import Result, assert_equal_to_one_device, run_one_device
from tests.support.gloo_pool import get_pool
from tests.support.models import FLOAT64
from tests.support.shapes import ALL, BATCHES, HEADS, SOME, Case, build_shape
from tests.support.tiers import tiered

pytestmark = pytest.mark.timeout(240)


def run_shapes(rank: int, num_ranks: int, cases: list[Case], backend: str) -> list[tuple[Result, Sent, Sent]]:
    """What a worker does: a training step of each shape; its result, what `explain` says it sends, what it sent."""
    found = []
    for case in cases:
        model, inputs = _build(case)
        explained, ran, loss = sent(rank, num_ranks, model, Ulysses(split=case.split), inputs, backend)
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((Result(loss, grads), explained, ran))
    return found


def _build(case: Case):
    return build_shape(*case.heads, case.batch, case.seq_len, case.repeat, num_layers=1)


def assert_shapes_exact(cases: list[Case], timeout: float, backend: str = "aot_eager", tolerance: float = FLOAT64):
    """On every rank, loss and gradients are those of one device and the collectives those explained."""
    for found in get_pool(cases[0].num_ranks).run(run_shapes, cases, backend, timeout=timeout):
        for case, (result, explained, ran) in zip(cases, found, strict=True):
            assert explained == ran, str(case)
            if case.seq_len > 1:  # a single token has no next one: its loss is 0 / 0 on one device too
                assert_equal_to_one_device(run_one_device(*_build(case)), result, tolerance)


def test_some_shapes_have_every_value_once() -> None:
    assert {case.heads for case in SOME} == set(HEADS)
    assert {case.batch for case in SOME} == set(BATCHES)
    assert {case.num_ranks for case in SOME} == {1, 2, 3, 4}
    assert {case.seq_len for case in SOME} >= {64, 61, 7, 1}
    assert {case.num_ranks - case.seq_len for case in SOME} >= {1}


@pytest.mark.parametrize("num_ranks", tiered([1, 2, 3, 4], quick=[3]))
def test_some_shapes(num_ranks: int) -> None:
    assert_shapes_exact([case for case in SOME if case.num_ranks == num_ranks], timeout=200)


@pytest.mark.inductor
@pytest.mark.slow
def test_an_uneven_shape_under_inductor() -> None:
    assert_shapes_exact([Case(3, (8, 2), 61, 1)], timeout=200, backend="inductor", tolerance=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("num_ranks", "heads"), list(itertools.product((1, 2, 3, 4), HEADS)), ids=lambda x: str(x).replace(" ", "")
)
def test_all_shapes(num_ranks: int, heads: tuple[int, int]) -> None:
    assert_shapes_exact([c for c in ALL if c.num_ranks == num_ranks and c.heads == heads], timeout=1100)
