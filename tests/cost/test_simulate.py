"""Two streams, by hand: what overlaps, what is waited for, and equal layers at once."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from sptransform.cost.hardware import hardware_of
from sptransform.cost.records import Message, Step, Work
from sptransform.cost.simulate import Timeline, simulate
from sptransform.cost.times import seconds

BESIDE, ALONE = hardware_of("l20-pcie"), hardware_of("h100-nvlink")
SMALL, LARGE = (Message("send_recv", size, (0, 1, 2, 3)) for size in (10**6, 10**9))


def kernel(traffic: int = 10**9, **more: Any) -> Work:
    return Work("k", "aten.add", "memory", "forward", "", traffic=traffic, **more)


def start(message: Message, **more: Any) -> Work:
    return Work("m", "send", "message", "forward", "", message=message, **more)


def wait(message: Message, **more: Any) -> Work:
    return Work("w", "wait", "wait", "forward", "", message=message, **more)


def run(*works: Work, hardware: object = BESIDE, overlap: bool | None = None) -> Timeline:
    return simulate(Step(works, 0, 4, parameters=100, gradients=0, inputs=10), hardware, overlap=overlap)


def test_a_message_is_hidden_beside_a_longer_kernel() -> None:
    timeline = run(start(SMALL), kernel(), wait(SMALL))
    assert timeline.seconds == seconds(kernel(), BESIDE)
    assert timeline.exposed_seconds == 0
    assert timeline.communication_seconds == seconds(start(SMALL), BESIDE)


def test_what_is_longer_than_the_kernel_is_exposed() -> None:
    timeline = run(start(LARGE), kernel(), wait(LARGE), kernel())
    taken, sent = seconds(kernel(), BESIDE), seconds(start(LARGE), BESIDE)
    assert timeline.seconds == pytest.approx(sent + taken)
    assert timeline.exposed_seconds == pytest.approx(sent - taken)
    assert [event.stream for event in timeline.events] == ["communication", "compute", "compute", "compute"]


def test_without_overlap_messages_run_alone() -> None:
    works = start(LARGE), kernel(), wait(LARGE)
    assert run(*works, hardware=ALONE).exposed_seconds == pytest.approx(seconds(works[0], ALONE))
    assert run(*works, overlap=False).exposed_seconds == pytest.approx(seconds(works[0], BESIDE))
    assert run(*works, hardware=ALONE, overlap=True).exposed_seconds < seconds(works[0], ALONE)


def test_messages_follow_each_other_and_are_waited_for_in_order() -> None:
    timeline = run(start(LARGE), start(LARGE), wait(LARGE), kernel(), wait(LARGE))
    sent = seconds(start(LARGE), BESIDE)
    first, second = (event for event in timeline.events if event.stream == "communication")
    assert (first.end, second.start, second.end) == pytest.approx((sent, sent, 2 * sent))
    assert [event.end for event in timeline.events if event.work.kind == "wait"] == pytest.approx([sent, 2 * sent])


def a_layer(rng: random.Random, copies: int) -> list[Work]:
    """Random works, among them messages that the next copy waits for."""
    sizes = [rng.choice((10**5, 10**7, 10**8, 10**9)) for _ in range(4)]
    messages = [Message("send_recv", size + i, (0, 1, 2, 3)) for i, size in enumerate(sizes)]
    works = [*map(start, messages), *map(wait, messages), *(kernel(rng.choice(sizes)) for _ in messages)]
    rng.shuffle(works)
    return [replace(w, copies=copies, allocates=(rng.randrange(50),), frees=(rng.randrange(50),)) for w in works]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("overlap", [True, False])
def test_equal_layers_at_once_are_the_layers_one_by_one(seed: int, overlap: bool) -> None:
    rng = random.Random(seed)
    works = [kernel(allocates=(40,)), *a_layer(rng, 30), kernel(10**8), *a_layer(rng, 7)]
    step = Step(tuple(works), 0, 4, parameters=100, gradients=0, inputs=10)
    folded = simulate(step, BESIDE, overlap=overlap)
    flat = simulate(replace(step, works=tuple(step.unrolled())), BESIDE, overlap=overlap)
    for name in ("seconds", "compute_seconds", "communication_seconds", "exposed_seconds"):
        assert getattr(folded, name) == pytest.approx(getattr(flat, name), rel=1e-6, abs=1e-9)
    assert folded.peak_bytes == flat.peak_bytes == step.peak_bytes()
    ends = sorted(event.end for event in flat.events)
    assert sorted(event.end for event in folded.unrolled()) == pytest.approx(ends, rel=1e-6)
    assert sorted(live for _, live in folded.live_bytes()) == sorted(live for _, live in flat.live_bytes())


def test_two_runs_of_as_many_layers_follow_each_other() -> None:
    works = [replace(kernel(copies=3), name=name, run=name) for name in ("encoder.1", "decoder.1")]
    step = Step(tuple(works), 0, 4, parameters=100, gradients=0, inputs=10)
    assert [work.name for work in step.unrolled()] == ["encoder.1"] * 3 + ["decoder.1"] * 3
    assert [event.work.name for event in simulate(step, BESIDE).unrolled()] == [work.name for work in step.unrolled()]


def test_many_equal_layers_are_few_events() -> None:
    timeline = run(*(replace(work, copies=1000) for work in (start(SMALL), kernel(), wait(SMALL))))
    assert len(timeline.events) == 3
    assert timeline.seconds == pytest.approx(1000 * seconds(kernel(), BESIDE))
