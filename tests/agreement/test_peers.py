"""Fifty random faults: every rank that can still raise does so within seconds, and names the rank at fault.

A scenario is one start of 2 to 4 processes. They meet four faults that leave their processes alive, one after the
other, so that each also shows that the ranks are in step after the last; then one of them is killed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import sptransform
from sptransform import Ulysses
from sptransform.agreement.peers import Peers
from sptransform.ops.communication import steps
from tests.support.gloo_pool import PRELOAD
from tests.support.golden import Golden
from tests.support.models import Inputs
from tests.support.tiers import tiered
from tests.support.tiny import AttentionWithLoss, token_inputs

pytestmark = pytest.mark.timeout(180)

SEEDS, QUICK, NUM_SOFT = range(10), (0, 3, 6), 4
CHECK_TIMEOUT = 4.0  # of ranks that wait for one that does not come; more than their compiles differ by
NAMED_WITHIN = 5.0  # seconds after a rank was killed
TOGETHER_WITHIN = 10.0  # seconds between the first and the last rank's error: the last may have to compile first
NEVER = 100.0  # seconds; an error that waits for this comes too late for the others


# --- models and what goes wrong -------------------------------------------------------------------------------

_dies_in: set[str] = set()


def _die_in(direction: str) -> None:
    if direction in _dies_in:
        _die()


def _die() -> None:
    os.write(_outcomes, (json.dumps({"died": time.time()}) + "\n").encode())
    os.kill(os.getpid(), signal.SIGKILL)


def _die_in_a_hop(name: str) -> None:
    """From now on, die once the first hop of the steps so called is on its way."""
    perform = steps.perform

    def until_a_hop(hops: steps.Steps[Any]) -> steps.Steps[Any]:
        yield next(hops)
        _die()

    def deadly(hops: steps.Steps[Any], group: str) -> Any:
        return perform(until_a_hop(hops) if hops.__name__ == name else hops, group)

    steps.perform = deadly


@torch.library.custom_op("sptransform_tests::mortal", mutates_args=())
def mortal(x: torch.Tensor) -> torch.Tensor:
    """The identity; where the process is to die in the middle of a forward, it dies here."""
    _die_in("forward")
    return x.clone()


@torch.library.custom_op("sptransform_tests::mortal_backward", mutates_args=())
def mortal_backward(grad: torch.Tensor) -> torch.Tensor:
    _die_in("backward")
    return grad.clone()


mortal.register_fake(torch.empty_like)
mortal_backward.register_fake(torch.empty_like)
mortal.register_autograd(lambda ctx, grad: mortal_backward(grad))


class Mortal(AttentionWithLoss):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return mortal(x)


class Other(AttentionWithLoss):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x.tanh()


class Raising(AttentionWithLoss):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("this rank's own")


class WithoutAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (self.weight.sum() * tokens * labels).sum()


def parallel(kind: type[nn.Module], strategy: Any = "ulysses", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    options = {"backend": "aot_eager", "check_timeout": NEVER} | options
    return sptransform.parallelize(kind().double(), strategy, **options)


def step(model: nn.Module, inputs: Inputs | None = None) -> None:
    model(**(inputs or token_inputs())).backward()


def shorter() -> Inputs:
    return {name: x[:, :8] for name, x in token_inputs().items()}


def raise_before(model: nn.Module) -> None:
    raise KeyError("before the call")


def skip_backward(model: nn.Module) -> None:
    model(**token_inputs())
    model(**token_inputs())


# What the rank at fault does instead of a step, the error the others raise, and its own.
SOFT: dict[str, tuple[Callable[[nn.Module], Any], str, str]] = {
    "another model": (lambda _: step(parallel(Other)), "ScheduleMismatchError", "ScheduleMismatchError"),
    "another strategy": (
        lambda _: step(parallel(Mortal, Ulysses(split="batch"))),
        "ScheduleMismatchError",
        "ScheduleMismatchError",
    ),
    "another option": (
        lambda _: step(parallel(Mortal, grad_sync=False)),
        "ScheduleMismatchError",
        "ScheduleMismatchError",
    ),
    "another shape": (lambda model: step(model, shorter()), "ScheduleMismatchError", "ScheduleMismatchError"),
    "no backward": (skip_backward, "ScheduleMismatchError", "ScheduleMismatchError"),
    "an error while tracing": (lambda _: step(parallel(Raising)), "RankFailedError", "CaptureError"),
    "an error while compiling": (lambda _: step(parallel(WithoutAttention)), "RankFailedError", "UsageError"),
    "an error before the call": (raise_before, "RankMissingError", "KeyError"),
    "no call": (lambda _: None, "RankMissingError", ""),
}
HARD = [
    "before the call",
    "in forward",
    "between forward and backward",
    "in backward",
    "at any moment",
    "in a hop forward",
    "in a hop backward",
]


@dataclass(frozen=True)
class Fault:
    kind: str
    victim: int


@dataclass(frozen=True)
class Scenario:
    """What happens, decided before anything starts."""

    num_ranks: int
    store: str
    starts_well: bool
    soft: tuple[Fault, ...]
    hard: Fault
    delay: float

    @staticmethod
    def of(seed: int) -> Scenario:
        generator = random.Random(seed)
        num_ranks = generator.choice([2, 3, 4])
        kinds = [list(SOFT)[(seed * NUM_SOFT + i) % len(SOFT)] for i in range(NUM_SOFT)]  # each kind equally often
        generator.shuffle(kinds)
        return Scenario(
            num_ranks,
            generator.choice(["file", "tcp"]),
            generator.random() < 0.5,
            tuple(Fault(kind, generator.randrange(num_ranks)) for kind in kinds),
            Fault(HARD[seed % len(HARD)], generator.randrange(num_ranks)),
            generator.uniform(0.0, 0.3),
        )


# --- one rank -------------------------------------------------------------------------------------------------

_outcomes = -1


def work(rank: int, scenario: Scenario, init_method: str, outcomes: str) -> None:
    """Go through the scenario and write a line for each fault."""
    global _outcomes
    _outcomes = os.open(outcomes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    log = os.open(f"{outcomes}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=scenario.num_ranks)
    # else a rank that has seen another shape alone has another graph from then on, which is a difference of its own
    torch._dynamo.config.automatic_dynamic_shapes = False
    healthy = parallel(Mortal, "ring" if "in a hop" in scenario.hard.kind else "ulysses")
    waiting = parallel(Mortal, check_timeout=CHECK_TIMEOUT)
    if scenario.starts_well:
        step(healthy)
    for fault in scenario.soft:
        _, expected, _ = SOFT[fault.kind]
        is_late = expected == "RankMissingError"
        if is_late:
            step(waiting)  # a short time-out leaves no time to compile
        dist.barrier()
        note(partial(meet, fault, rank, waiting if is_late else healthy))
        dist.barrier()
        if is_late and rank == fault.victim:
            note(partial(step, waiting))  # a rank that comes too late learns what the others concluded
    step(healthy)
    dist.barrier()
    note(partial(die_in_time, scenario, rank, healthy))
    os._exit(0)


def meet(fault: Fault, rank: int, model: nn.Module) -> None:
    if rank == fault.victim:
        SOFT[fault.kind][0](model)
    else:
        step(model)


def die_in_time(scenario: Scenario, rank: int, model: nn.Module) -> None:
    """Train until something happens."""
    kind, is_victim = scenario.hard.kind, rank == scenario.hard.victim
    if is_victim and "in a hop" in kind:
        _die_in_a_hop(f"{kind.removeprefix('in a hop ')}_steps")
    if is_victim and kind == "before the call":
        _die()
    if is_victim and kind == "at any moment":
        threading.Timer(scenario.delay, _die).start()
    if is_victim and kind in ("in forward", "in backward"):
        _dies_in.add(kind.removeprefix("in "))
    while True:
        loss = model(**token_inputs())
        if is_victim and kind == "between forward and backward":
            _die()
        loss.backward()


def note(call: Callable[[], None]) -> None:
    outcome: dict[str, Any] = {"error": "", "message": "", "ranks": []}
    try:
        call()
    except Exception as error:
        outcome = {"error": type(error).__name__, "message": str(error), "ranks": list(getattr(error, "ranks", []))}
    os.write(_outcomes, (json.dumps(outcome | {"at": time.time()}) + "\n").encode())


# --- the scenarios --------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(scenario: Scenario, directory: Path) -> list[list[dict[str, Any]]]:
    """Every rank's outcomes, in order; no process may outlive its time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    where = f"file://{directory}/store" if scenario.store == "file" else f"tcp://127.0.0.1:{free_port()}"
    files = [directory / f"rank{rank}" for rank in range(scenario.num_ranks)]
    processes = [
        context.Process(target=work, args=(rank, scenario, where, str(file)), daemon=True)
        for rank, file in enumerate(files)
    ]
    deadline = time.monotonic() + 150.0
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((directory / f"rank{rank}.log").read_text()[-2000:] for rank in range(scenario.num_ranks))
    assert not hanging, f"ranks {hanging} hang in {scenario}\n{logs}"
    codes = [process.exitcode for process in processes]
    expected = [-signal.SIGKILL if rank == scenario.hard.victim else 0 for rank in range(scenario.num_ranks)]
    assert codes == expected, f"exit codes {codes} in {scenario}\n{logs}"
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


@pytest.mark.parametrize("seed", tiered(SEEDS, quick=QUICK))
def test_every_rank_raises_and_names_the_one_at_fault(seed: int, tmp_path: Path, golden: Golden) -> None:
    scenario = Scenario.of(seed)
    outcomes = run(scenario, tmp_path)
    for fault in scenario.soft:
        _, error, own = SOFT[fault.kind]
        found = [lines.pop(0) for lines in outcomes]
        context = f"{fault} of {scenario}: {found}"
        others = [rank for rank in range(scenario.num_ranks) if rank != fault.victim]
        assert [found[rank]["error"] for rank in others] == [error] * len(others), context
        assert found[fault.victim]["error"] == own, context
        assert len({found[rank]["message"] for rank in others}) == 1, context
        assert f"rank {fault.victim}" in found[others[0]]["message"] or error == "ScheduleMismatchError", context
        assert fault.victim in found[others[0]]["ranks"], context
        if error == own:
            assert found[fault.victim]["message"] == found[others[0]]["message"], context
        allowed = TOGETHER_WITHIN + (CHECK_TIMEOUT if error == "RankMissingError" else 0.0)
        assert max(x["at"] for x in found) - min(x["at"] for x in found) < allowed, context
        if error == "RankMissingError":
            late = outcomes[fault.victim].pop(0)
            assert late["error"] == error and late["message"] == found[others[0]]["message"], context
    (death,) = outcomes.pop(scenario.hard.victim)
    for (survivor,) in outcomes:
        context = f"{scenario.hard} of {scenario}: {survivor}"
        assert survivor["error"] == "RankLostError", context
        assert survivor["ranks"] == [scenario.hard.victim], context
        assert survivor["at"] - death["died"] < NAMED_WITHIN, context
        message = survivor["message"].replace(f"rank {scenario.hard.victim}", "rank N")
        golden.check("agreement_lost", message=message)


def test_there_are_fifty_faults_of_all_kinds() -> None:
    scenarios = [Scenario.of(seed) for seed in SEEDS]
    assert sum(len(scenario.soft) + 1 for scenario in scenarios) == 50
    assert {scenario.hard.kind for scenario in scenarios} == set(HARD)
    quick = [scenarios[seed] for seed in QUICK]
    assert {fault.kind for scenario in quick for fault in scenario.soft} == set(SOFT)
    assert {scenario.num_ranks for scenario in quick} == {2, 3, 4}
    assert {scenario.store for scenario in quick} == {"file", "tcp"}
    assert any(scenario.hard.victim == 0 and scenario.store == "tcp" for scenario in quick)


def host_a_store(ready: Any) -> None:
    """Keep a store alive until this process is killed."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    ready.send(store.port)
    time.sleep(NEVER)


def test_a_store_whose_host_is_gone_proves_nothing_of_others() -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ours, theirs = context.Pipe()
    host = context.Process(target=host_a_store, args=(theirs,), daemon=True)
    host.start()
    try:
        peers = Peers(dist.TCPStore("127.0.0.1", ours.recv(), is_master=False), 1)
        assert peers.gone([0]) == []
    finally:
        host.kill()
    host.join()
    assert peers.gone([0]) == []
