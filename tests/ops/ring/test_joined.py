"""The pieces of packed documents in one call of a kernel. The kernels are stand-ins, see
`tests/support/cuda_stand_ins.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sptransform.ops.ring.joined import groups_of
from sptransform.ops.ring.plan import Call
from sptransform.sharding.partition import Partition
from tests.ops.ring.ranks import Problem, Ring, assert_equal, one_device
from tests.ops.ring.test_data_plan import SAME, documents, mask_of
from tests.support.cuda_stand_ins import Calls, on_cpu

LENGTHS = [4, 9, 5, 1, 2, 13, 6]


@pytest.fixture
def calls(kernel: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    with on_cpu(kernel, monkeypatch) as calls:
        yield calls


@pytest.mark.parametrize("kernel", ["flash-attn", "CUDA flash"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("num_ranks", "layout", "nearest"), [(1, "contiguous", 0), (2, "zigzag", 0), (3, "contiguous", None)]
)
def test_documents(num_ranks: int, layout: str, nearest: int | None, batch: int, calls: Calls) -> None:
    """Each row of the batch has other documents. One call computes all of one kind; of the second row one document is
    in two pieces.
    """
    size, same = sum(LENGTHS), documents(LENGTHS, batch)
    problem = Problem.random(size)
    expected = one_device(problem, mask_of(SAME, [same.mT], [same], (nearest, None)))
    partition = getattr(Partition, layout)(size, num_ranks)
    ring = Ring(partition, partition, (same.mT,), (same,), {"mask": SAME, "nearest": nearest})
    assert_equal(ring.run(problem), expected)
    if num_ranks == 1:
        assert len(calls) == 2 * batch


@pytest.mark.parametrize("kernel", ["flash-attn"])
def test_a_softcap(calls: Calls) -> None:
    same = documents(LENGTHS)
    problem = Problem.random(sum(LENGTHS))
    partition = Partition.contiguous(sum(LENGTHS), 2)
    options = {"mask": SAME, "nearest": 0, "softcap": 3.0}
    found = Ring(partition, partition, (same.mT,), (same,), options).run(problem)
    assert calls
    whole = Partition.contiguous(sum(LENGTHS), 1)
    mask = mask_of(SAME, [same.mT], [same], (0, None))[0, 0]
    program, rows = "%0", (mask,)
    assert_equal(found, Ring(whole, whole, rows, (), {"mask": program, "softcap": 3.0}).run(problem))


def test_calls_with_equal_rows_stay_apart() -> None:
    """As where a document is in two pieces among a rank's keys."""
    places = (0, 0), (0, 8), (4, 0)
    first, other, more = (Call(at, at + 4, keys, keys + 4, "full", decided=True) for at, keys in places)
    causal, last = (Call(at, at + 4, at, at + 4, "causal", decided=True) for at in (8, 20))
    masked = Call(12, 16, 12, 16, "full")
    assert groups_of([first, other, more, causal, masked], 1, 24) == [(other, more)]
    assert groups_of([first, other, more, causal, masked, last], 1, 24) == [(other, more), (causal, last)]


def test_no_more_keys_are_copied_than_there_are() -> None:
    """The pieces of a document in stripes all see the keys of earlier stripes."""
    calls = [Call(at, at + 8, 0, at, "full", decided=True) for at in range(8, 80, 8)]
    groups = groups_of(calls, 1, 80)
    assert [tuple(call.k_stop for call in group) for group in groups] == [(8, 16, 24, 32)]
