"""What the schedule sends, when, how much of it lives at once, and what its graph looks like."""

from __future__ import annotations

import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sptransform.graph.printer import text
from sptransform.ops.communication.steps import COMMUNICATING, Start, Steps, Wait, drive, perform_together
from sptransform.ops.ring import trace_steps
from sptransform.ops.ring.kernels.interface import Kernel
from sptransform.sharding.partition import Partition
from tests.ops.ring.ranks import Problem, Ring
from tests.support.golden import Golden

BATCH, HEADS, KEY_HEADS, SIZE, DIM = 2, 4, 2, 48, 8


def make(num_ranks: int, dtype: torch.dtype = torch.float32) -> tuple[Problem, Ring]:
    partition = Partition.zigzag(SIZE, num_ranks)
    problem = Problem.random(SIZE, batch=BATCH, heads=HEADS, key_heads=KEY_HEADS, dim=DIM, dtype=dtype)
    return problem, Ring(partition, partition, options={"nearest": 0})


def recorded(steps: Steps[Any], asked: list[Start | Wait | str]) -> Steps[Any]:
    """The same steps; what they ask is also put into ``asked``."""
    answer = None
    while True:
        try:
            step = steps.send(answer)
        except StopIteration as end:
            return end.value
        asked.append(step)
        answer = yield step
        step = None


def run_recorded(num_ranks: int, dtype: torch.dtype = torch.float32) -> tuple[dict[int, list], dict[int, list]]:
    """What each rank asks for, forward and backward, with a "block" wherever one is computed in between."""
    problem, ring = make(num_ranks, dtype)
    forward: dict[int, list] = {rank: [] for rank in range(num_ranks)}
    backward: dict[int, list] = {rank: [] for rank in range(num_ranks)}
    running = forward

    class Blocks(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.name() in ("sptransform::attention_block", "sptransform::attention_block_backward"):
                running[current[0]].append("block")
            return func(*args, **(kwargs or {}))

    current = [0]

    def on(rank: int, steps: Steps[Any], asked: list) -> Steps[Any]:
        inner = recorded(steps, asked)
        answer = None
        while True:
            current[0] = rank
            try:
                step = inner.send(answer)
            except StopIteration as end:
                return end.value
            answer = yield step

    steps = COMMUNICATING["ring_attention"]
    with Blocks():
        results = perform_together(
            {r: on(r, steps(r, *ring.own(problem, r), **ring.keywords), forward[r]) for r in forward}
        )
        running = backward
        steps = COMMUNICATING["ring_attention_backward"]
        arguments = {r: ring.backward_arguments(problem, r, results[r]) for r in results}
        perform_together({r: on(r, steps(r, *arguments[r], **ring.keywords), backward[r]) for r in backward})
    return forward, backward


def sent_bytes(asked: list) -> list[int]:
    return [step.x.nbytes for step in asked if isinstance(step, Start)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_hops_and_bytes(num_ranks: int, dtype: torch.dtype) -> None:
    """Forward 2KBcD(N-1) elements in N-1 hops; backward as many K,V again, and their gradients in float32."""
    forward, backward = run_recorded(num_ranks, dtype)
    block = 2 * KEY_HEADS * BATCH * (SIZE // num_ranks) * DIM
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    for rank in range(num_ranks):
        assert sent_bytes(forward[rank]) == [block * dtype.itemsize] * (num_ranks - 1)
        sizes = [block * dtype.itemsize, block * accumulated.itemsize]
        assert sorted(sent_bytes(backward[rank])) == sorted(sizes * (num_ranks - 1))
        for step in (*forward[rank], *backward[rank]):
            if isinstance(step, Start):
                assert [i for i, count in enumerate(step.sent) if count] == [(rank + 1) % num_ranks]
                assert [i for i, count in enumerate(step.received) if count] == [(rank - 1) % num_ranks]


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_hops_overlap_with_blocks(num_ranks: int) -> None:
    """Start, block, wait; in backward gradients that arrive are waited for after the block they are added to."""
    forward, backward = run_recorded(num_ranks)
    for rank in range(num_ranks):
        kinds = [step if isinstance(step, str) else type(step).__name__ for step in forward[rank]]
        assert kinds == ["Start", "block", "Wait"] * (num_ranks - 1) + ["block"]
        kinds = [step if isinstance(step, str) else type(step).__name__ for step in backward[rank]]
        first, middle = ["Start", "block", "Wait"], ["Start", "block", "Wait", "Start", "Wait"]
        if num_ranks == 2:
            assert kinds == [*first, "block", "Start", "Wait"]
        else:
            second = ["Start", "block", "Start", "Wait"]
            last = ["block", "Wait", "Start", "Wait"]
            assert kinds == [*first, *second, *middle * (num_ranks - 3), *last]


@pytest.mark.parametrize("name", ["ring_attention", "ring_attention_backward"])
def test_one_block_lives_beside_the_next_one(name: str) -> None:
    """At most two blocks of K,V beyond the local ones: the one computed with, and the one that arrives."""
    num_ranks, rank = 5, 2
    problem, ring = make(num_ranks)
    messages: list[weakref.ref] = []
    most = 0

    def count() -> None:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in messages))

    class Counts(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            count()
            return func(*args, **(kwargs or {}))

    def start(asked: Start) -> Tensor:
        # keys and values begin as the input's dtype; gradients are summed in another
        if asked.x.dtype == torch.bfloat16 and not messages:
            messages.append(weakref.ref(asked.x.untyped_storage()))
        came = torch.zeros(sum(asked.received), dtype=asked.x.dtype)
        if asked.x.dtype == torch.bfloat16:
            messages.append(weakref.ref(came.untyped_storage()))
        count()
        return came

    problem = problem.to(torch.bfloat16)
    args = ring.own(problem, rank)
    if name.endswith("backward"):
        result = drive(COMMUNICATING["ring_attention"](rank, *args, **ring.keywords), start, lambda came: came)
        args = ring.backward_arguments(problem, rank, result)
        messages, most = [], 0
    with Counts():
        drive(COMMUNICATING[name](rank, *args, **ring.keywords), start, lambda came: came)
    assert len(messages) == num_ranks
    assert most == 2
    assert all(ref() is None for ref in messages)


def test_ranks_without_anything_take_the_same_steps() -> None:
    """Messages of nothing travel too."""
    partition = Partition.of(6, [[(0, 3)], [], [(3, 6)]])
    problem = Problem.random(6)
    ring = Ring(partition, partition, options={"nearest": 0})
    asked: dict[int, list] = {rank: [] for rank in range(3)}
    steps = COMMUNICATING["ring_attention"]
    perform_together({r: recorded(steps(r, *ring.own(problem, r), **ring.keywords), asked[r]) for r in asked})
    assert [[type(step) for step in own] for own in asked.values()] == [[Start, Wait] * 2] * 3
    assert sent_bytes(asked[1])[0] == 0


def traced(name: str, num_ranks: int, dtype: torch.dtype) -> tuple[torch.fx.GraphModule, list[Any], Ring]:
    """Rank 1's graph, the op's arguments there, and who shares what."""
    problem, ring = make(num_ranks, dtype)
    args = ring.own(problem, 1)
    if name == "ring_attention_backward":
        args = ring.backward_arguments(problem, 1, ring.forward(problem)[1])
    return trace_steps(name, 1, tuple(args), ring.keywords), args, ring


def test_expanded(golden: Golden) -> None:
    """Hops, waits, blocks and merges are nodes, in the order in which they run."""
    graphs = {}
    for title, name in (("forward", "ring_attention"), ("backward", "ring_attention_backward")):
        gm, *_ = traced(name, 2, torch.bfloat16)
        graphs[title] = text(gm.graph.nodes)
        ops = [
            node.target for node in gm.graph.nodes if getattr(node.target, "namespace", "") in ("aten", "sptransform")
        ]
        assert not any(op._schema.is_mutable for op in ops)
    golden.check("ring_attention", **graphs)


@pytest.mark.parametrize("name", ["ring_attention", "ring_attention_backward"])
def test_the_expanded_graph_computes_what_the_steps_do(name: str) -> None:
    gm, args, ring = traced(name, 3, torch.float64)
    sent: list[Tensor] = []

    def start(x: Tensor, received: list[int], *_: Any) -> Tensor:
        sent.append(x)
        return torch.randn(sum(received), dtype=x.dtype, generator=torch.Generator().manual_seed(len(sent)))

    expected = drive(
        COMMUNICATING[name](1, *args, **ring.keywords),
        lambda asked: start(asked.x, asked.received),
        lambda came: came,
    )
    sent.clear()
    targets = {"all_to_all_single": start, "wait_tensor": lambda came: came}
    found = _Interpreter(gm, targets).run(*torch.utils._pytree.tree_leaves(args))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-13, rtol=1e-13)
        assert x.stride() == y.stride()


class _Interpreter(torch.fx.Interpreter):
    def __init__(self, gm: torch.fx.GraphModule, targets: dict[str, Any]) -> None:
        super().__init__(gm)
        self.targets = targets

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if getattr(target, "namespace", "") == "_c10d_functional":
            target = self.targets[target._schema.name.split("::")[1]]
        return super().call_function(target, args, kwargs)


def test_tracing_computes_nothing() -> None:
    problem, ring = make(3)
    ran = mock.Mock(side_effect=AssertionError("a kernel ran"))
    with mock.patch("sptransform.ops.ring.blocks.choose", return_value=Kernel("none", ran, ran, ran)):
        trace_steps("ring_attention", 0, tuple(ring.own(problem, 0)), ring.keywords)
