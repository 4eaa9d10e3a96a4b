"""Parameters in parts: what is gathered, reduced and held, by hand."""

from __future__ import annotations

from sptransform.cost.data_parallel import with_parameter_shards
from sptransform.cost.records import Step, Work
from sptransform.cost.simulate import simulate

UNITS = {"": 1000, "layers.0": 400, "layers.1": 400, "layers.2": 400}
COPIES = {"layers.1": 6}
COUNT = 1000 + 8 * 400


def a_step() -> Step:
    """Eight layers between an embedding and a head; each layer's backward makes its gradients."""

    def work(layer: str, direction: str, allocated: int) -> Work:
        copies = COPIES.get(layer, 1)
        return Work("k", "aten.mm", "matmul", direction, layer, dtype="bfloat16", allocates=(allocated,), copies=copies)

    path = ["embedding", "layers.0", "layers.1", "layers.2", "head"]
    works = [work(layer, "forward", 0) for layer in path]
    works += [work(layer, "backward", 2 * UNITS.get(layer, 500)) for layer in reversed(path)]
    return Step(tuple(works), 0, 1, parameters=2 * COUNT, gradients=2 * COUNT, inputs=0)


def test_each_unit_is_gathered_twice_and_reduced_once() -> None:
    step = with_parameter_shards(a_step(), range(4), UNITS)
    sent = dict.fromkeys(("all_gather", "reduce_scatter"), 0)
    for work in step.unrolled():
        if work.kind == "message":
            sent[work.message.kind] += work.message.bytes_sent
    # two bytes of a parameter twice, four of a gradient once; the rank sends 3/4
    assert sent == {"all_gather": COUNT * 2 * 2 * 3 // 4, "reduce_scatter": COUNT * 4 * 3 // 4}


def test_a_rank_ends_with_its_parts() -> None:
    step = with_parameter_shards(a_step(), range(4), UNITS, kept=4)
    assert step.parameters == step.gradients == COUNT
    held = sum((work.allocated - work.freed) * work.copies for work in step.works)
    assert held == step.gradients


def test_every_gather_is_waited_for_one_unit_ahead() -> None:
    step = with_parameter_shards(a_step(), range(4), UNITS)
    for direction in ("forward", "backward"):
        works = [work for work in step.unrolled() if work.direction == direction]
        gathers = [w for w in works if w.kind == "message" and w.message.kind == "all_gather"]
        waits = [w for w in works if w.kind == "wait" and w.message is not None]
        assert [w.message for w in gathers] == [w.message for w in waits]
        first = works.index(waits[0])
        assert works[first + 1] is gathers[1]  # of the next unit


def test_beside_kernels_gathers_are_hidden() -> None:
    step = with_parameter_shards(a_step(), range(4), UNITS)
    assert simulate(step, "h100-nvlink", overlap=True).seconds < simulate(step, "h100-nvlink", overlap=False).seconds
