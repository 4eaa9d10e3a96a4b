"""What the caching allocator reserves, by hand, and what holds of any sequence of requests."""

from __future__ import annotations

import random

import pytest

from sptransform.cost.records import Step, Work
from sptransform.cost.reserved import reserved_bytes

MIB = 1 << 20


def reserved(*works: tuple[list[int], list[int]], copies: int = 1) -> int:
    """Of ops that allocate and free so many MiB."""
    made = (
        Work("k", "aten.add", "memory", "forward", "", allocates=sizes(new), frees=sizes(old), copies=copies)
        for new, old in works
    )
    return reserved_bytes(Step(tuple(made), 0, 1, parameters=0, gradients=0, inputs=0)) // MIB


def sizes(mib: list[int]) -> tuple[int, ...]:
    return tuple(size * MIB for size in mib)


@pytest.mark.parametrize(
    ("works", "expected"),
    [
        ([([40], [])], 40),
        ([([41], []), ([7], [])], 42 + 20),  # segments of 2 MiB; of 20 for what is below 10
        ([([40], [40]), ([40], [])], 40),  # what is free is used again
        ([([40], [40]), ([30], []), ([10], [])], 40),  # by two, of which each takes a part
        ([([40], [40]), ([30], []), ([12], [])], 40 + 12),  # 10 are left
        ([([40], [40]), ([30], []), ([10], [10, 30]), ([40], [])], 40),  # free neighbours are one block
        ([([40], []), ([20], [40, 20]), ([60], [])], 40 + 20 + 60),  # two segments are not
        ([([60], []), ([40], [60, 40]), ([40], []), ([60], [])], 100),  # the smallest that fits
    ],
)
def test_by_hand(works: list[tuple[list[int], list[int]]], expected: int) -> None:
    assert reserved(*works) == expected


def test_small_requests_share_segments_of_two_mib() -> None:
    works = tuple(Work("k", "aten.add", "memory", "forward", "", allocates=(1000,)) for _ in range(2049))
    step = Step(works, 0, 1, parameters=7, gradients=0, inputs=3)
    assert reserved_bytes(step) == 2 * 2 * MIB + 10  # 2048 of 1024 bytes fill one


def test_equal_layers_are_unrolled() -> None:
    assert reserved(([40], []), copies=5) == 200
    assert reserved(([40], [40]), copies=5) == 40


def test_what_is_freed_at_once_may_have_been_made_in_pieces() -> None:
    assert reserved(([40, 20], [60]), ([40], [])) == 60


def test_no_less_is_reserved_than_is_held_and_a_step_again_needs_little_more() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        works, live = [], []
        for _ in range(200):
            new = [rng.randrange(1, 40 * MIB) for _ in range(rng.randrange(3))]
            live += new
            rng.shuffle(live)
            old = [live.pop() for _ in range(rng.randrange(3)) if live]
            works.append(Work("k", "aten.add", "memory", "forward", "", allocates=tuple(new), frees=tuple(old)))
        step = Step(tuple(works), 0, 1, parameters=0, gradients=0, inputs=0)
        assert step.peak_bytes() <= reserved_bytes(step) < 2 * step.peak_bytes()
