"""Ranks as threads that take turns: every rank runs its own graph, uneven partitions and random numbers included.

    results = in_lockstep(4, lambda rank: graphs[rank](*inputs[rank]))

A rank runs until it meets a functional collective, leaves its tensor there and passes the turn on; when the turn
comes back everybody's tensor is there. No process group exists and nothing runs at the same time, so runs are
exactly repeatable. Beside `tests/simulated.py`, which runs one graph on all ranks:

- Sizes may differ between ranks, so this is for lengths that the ranks do not divide.
- Each rank has a random generator of its own, all of them seeded alike, as in real runs.
- Ranks that disagree about the next collective are an error that names both, not a hang.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sptransform.mesh import PRETENDED_GROUP
from sptransform.ops.groups import pretend

T = TypeVar("T")


class _Stage:
    """Whose turn it is, and what every rank brought to each collective."""

    def __init__(self, num_ranks: int, seed: int) -> None:
        self.num_ranks = num_ranks
        self.brought: list[list[tuple[str, tuple[Any, ...]]]] = [[] for _ in range(num_ranks)]
        self.errors: dict[int, BaseException] = {}
        self._seed = seed
        self._turn = 0
        self._finished: set[int] = set()
        self._changed = threading.Condition()

    def start(self, rank: int) -> None:
        self._wait(rank)
        torch.manual_seed(self._seed)

    def _wait(self, rank: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == rank)

    def _pass_on(self, rank: int) -> None:
        with self._changed:
            others = [(rank + step) % self.num_ranks for step in range(1, self.num_ranks + 1)]
            self._turn = next((other for other in others if other not in self._finished), rank)
            self._changed.notify_all()

    def finish(self, rank: int) -> None:
        self._finished.add(rank)
        self._pass_on(rank)

    def meet(self, rank: int, name: str, args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """Every rank's arguments of this collective, in rank order."""
        mine = self.brought[rank]
        mine.append((name, args))
        at = len(mine) - 1
        state = torch.get_rng_state()
        self._pass_on(rank)
        self._wait(rank)
        torch.set_rng_state(state)
        for other, theirs in enumerate(self.brought):
            if len(theirs) <= at:
                raise RuntimeError(f"rank {other} ended before collective {at}, {name}, of rank {rank}")
            if theirs[at][0] != name:
                raise RuntimeError(f"collective {at} is {name} on rank {rank} and {theirs[at][0]} on rank {other}")
        return [theirs[at][1] for theirs in self.brought]


class _Collectives(TorchDispatchMode):
    """What the functional collectives mean, by their definitions."""

    supports_higher_order_operators = True  # they pass through

    def __init__(self, stage: _Stage, rank: int) -> None:
        super().__init__()
        self.stage, self.rank = stage, rank

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "namespace", "") != "_c10d_functional":
            return func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name == "wait_tensor":
            return args[0]
        everyone = self.stage.meet(self.rank, name, args)
        tensors = [theirs[0] for theirs in everyone]
        if name == "all_reduce":
            assert len({(t.shape, t.dtype) for t in tensors}) == 1, f"all_reduce of {[t.shape for t in tensors]}"
            return torch.stack(tensors).sum(0)
        if name == "all_gather_into_tensor":
            assert len({(t.shape, t.dtype) for t in tensors}) == 1, f"all_gather of {[t.shape for t in tensors]}"
            return torch.cat(tensors)
        if name == "reduce_scatter_tensor":
            assert len({(t.shape, t.dtype) for t in tensors}) == 1, f"reduce_scatter of {[t.shape for t in tensors]}"
            return torch.stack(tensors).sum(0).chunk(len(tensors))[self.rank].clone()
        assert name == "all_to_all_single", name
        expected = args[1]
        pieces = [theirs[0].split(list(theirs[2]))[self.rank] for theirs in everyone]
        came = [len(piece) for piece in pieces]
        assert came == list(expected), f"rank {self.rank} was sent {came}, and expected {expected}"
        return torch.cat(pieces)


def in_lockstep(num_ranks: int, run: Callable[[int], T], *, seed: int = 0) -> list[T]:
    """`run(rank)` on every rank; the results in rank order. The first rank's exception is raised here."""
    stage = _Stage(num_ranks, seed)
    results: dict[int, T] = {}
    # what is in force around the call; a thread starts without it
    autocast = torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")

    def work(rank: int) -> None:
        stage.start(rank)
        try:
            with pretend(PRETENDED_GROUP, rank), torch.autocast("cpu", *autocast), _Collectives(stage, rank):
                results[rank] = run(rank)
        except BaseException as error:
            stage.errors[rank] = error
        finally:
            stage.finish(rank)

    state = torch.get_rng_state()
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_rng_state(state)
    for error in stage.errors.values():
        raise error
    return [results[rank] for rank in range(num_ranks)]
