"""Ranks as threads that take turns: every rank runs its own graph, uneven partitions and random numbers included.

    results = in_lockstep(4, lambda rank: graphs[rank](*inputs[rank]))

A rank runs until it meets a functional collective, or an exchange of an op that communicates inside, leaves its tensor
there and passes the turn on; when the turn comes back everybody's tensor is there. No process group exists and nothing
runs at the same time, so runs are exactly repeatable. Beside `tests/support/simulated.py`, which runs one
graph on all ranks:

- Sizes may differ between ranks, so this is for lengths that the ranks do not divide.
- Each rank has a random generator of its own, all of them seeded alike, as in real runs.
- Ranks that disagree about the next collective are an error that names both, not a hang.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sptransform.ops.communication.steps import COMMUNICATING, Start, drive, group_of
from sptransform.ops.groups import pretend
from sptransform.sharding.mesh import Mesh

T = TypeVar("T")


class _Stage:
    """Whose turn it is, and what every rank brought to each collective."""

    def __init__(self, num_ranks: int, seed: int, inner: int) -> None:
        self.num_ranks, self.inner = num_ranks, inner
        # of each rank, by group: the collectives it came to, in order
        self.brought: list[dict[str, list[tuple[str, tuple[Any, ...]]]]] = [{} for _ in range(num_ranks)]
        self.errors: dict[int, BaseException] = {}
        self._seed = seed
        self._turn = 0
        self._finished: set[int] = set()
        self._is_abandoned = False
        self._changed = threading.Condition()

    def start(self, rank: int) -> None:
        self._wait(rank)
        torch.manual_seed(self._seed)

    def _wait(self, rank: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == rank or self._is_abandoned)
        if self._is_abandoned:
            raise RuntimeError("nobody waits for the ranks any more")

    def _pass_on(self, rank: int) -> None:
        with self._changed:
            others = [(rank + step) % self.num_ranks for step in range(1, self.num_ranks + 1)]
            self._turn = next((other for other in others if other not in self._finished), rank)
            self._changed.notify_all()

    def finish(self, rank: int) -> None:
        self._finished.add(rank)
        self._pass_on(rank)

    def wait_for(self, number: int) -> None:
        """Return when so many ranks have ended."""
        # not by joining threads: an interrupted join may take a thread that still runs for one that has ended
        with self._changed:
            self._changed.wait_for(lambda: len(self._finished) >= number)

    def abandon(self) -> None:
        """Let every rank end at its next turn."""
        with self._changed:
            self._is_abandoned = True
            self._changed.notify_all()

    def mesh_of(self, rank: int) -> tuple[Mesh, ...]:
        """The ranks as one mesh dim, and as the two that `Mesh.split` makes of them."""
        mesh = Mesh.pretended(self.num_ranks, rank)
        return mesh, *mesh.split(self.num_ranks // self.inner, self.inner)

    def members(self, rank: int, group: str) -> list[int]:
        """Who is in the rank's group of that name."""
        dim = [mesh.group for mesh in self.mesh_of(rank)].index(group)
        meshes = [self.mesh_of(other)[1:] for other in range(self.num_ranks)]
        place = [[mesh.rank for at, mesh in enumerate(own, 1) if at != dim] for own in meshes]
        return [r for r in range(self.num_ranks) if dim == 0 or place[r] == place[rank]]

    def meet(self, rank: int, group: str, name: str, args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """The arguments of this collective of every rank in the group, in rank order.

        What comes in which order matters within a group only, as it does where ranks run at the same time.
        """
        mine = self.brought[rank].setdefault(group, [])
        mine.append((name, args))
        at = len(mine) - 1
        theirs = {other: self.brought[other].setdefault(group, []) for other in self.members(rank, group)}
        state = _random_state()
        while True:
            before = self._progress()
            self._pass_on(rank)
            self._wait(rank)
            missing = [other for other, brought in theirs.items() if len(brought) <= at]
            if not missing:
                break
            if ended := self._finished & set(missing):
                raise RuntimeError(f"rank {min(ended)} ended before collective {at}, {name}, of rank {rank}")
            if self._progress() == before:
                raise RuntimeError(f"rank {missing[0]} waits for others in collective {at}, {name}, of rank {rank}")
        _restore(state)
        for other, brought in theirs.items():
            if brought[at][0] != name:
                raise RuntimeError(f"collective {at} is {name} on rank {rank} and {brought[at][0]} on rank {other}")
        return [brought[at][1] for brought in theirs.values()]

    def _progress(self) -> int:
        """Grows in each round of turns, unless every rank waits for another."""
        return len(self._finished) + sum(len(brought) for own in self.brought for brought in own.values())


class _Collectives(TorchDispatchMode):
    """What the functional collectives mean, by their definitions."""

    supports_higher_order_operators = True  # they pass through

    def __init__(self, stage: _Stage, rank: int) -> None:
        super().__init__()
        self.stage, self.rank = stage, rank

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # higher-order operators have a namespace, and no schema
        namespace = func.namespace if isinstance(func, torch._ops.OpOverload) else ""
        name = func._schema.name.split("::")[1] if namespace else ""
        if namespace == "sptransform" and name in COMMUNICATING and group_of(name, args, kwargs):
            steps = COMMUNICATING[name](self._rank_in(group_of(name, args, kwargs)), *args, **kwargs)
            group = group_of(name, args, kwargs)
            return drive(steps, lambda asked: self._exchange(name, group, asked), lambda came: came)
        if namespace != "_c10d_functional":
            return func(*args, **kwargs)
        if name == "wait_tensor":
            return args[0]
        if name == "all_to_all_single":
            return self._exchange(name, args[-1], Start(args[0], sent=list(args[2]), received=list(args[1])))
        everyone = self.stage.meet(self.rank, args[-1], name, args)
        tensors = [theirs[0] for theirs in everyone]
        if name == "all_reduce":
            assert len({(t.shape, t.dtype) for t in tensors}) == 1, f"all_reduce of {[t.shape for t in tensors]}"
            parts = torch.stack(tensors)
            return parts.amax(0) if args[1] == "max" else parts.sum(0)
        if name == "all_gather_into_tensor":
            assert len({(t.shape, t.dtype) for t in tensors}) == 1, f"all_gather of {[t.shape for t in tensors]}"
            return torch.cat(tensors)
        assert name == "reduce_scatter_tensor", name
        assert len({(t.shape, t.dtype) for t in tensors}) == 1, f"reduce_scatter of {[t.shape for t in tensors]}"
        return torch.stack(tensors).sum(0).chunk(len(tensors))[self._rank_in(args[-1])].clone()

    def _rank_in(self, group: str) -> int:
        return self.stage.members(self.rank, group).index(self.rank)

    def _exchange(self, name: str, group: str, asked: Start) -> Tensor:
        everyone = self.stage.meet(self.rank, group, name, (asked,))
        pieces = [theirs.x.split(theirs.sent)[self._rank_in(group)] for (theirs,) in everyone]
        came = [len(piece) for piece in pieces]
        assert came == list(asked.received), f"rank {self.rank} was sent {came}, and expected {asked.received}"
        return torch.cat(pieces)


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_initialized() else ["cpu"]


def _random_state() -> list[Tensor]:
    """The states of the generators, of the CPU and, where it is in use, the GPU."""
    return [torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state() for device in _devices()]


def _restore(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)


def in_lockstep(num_ranks: int, run: Callable[[int], T], *, seed: int = 0, inner: int = 1) -> list[T]:
    """`run(rank)` on every rank; the results in rank order. The first rank's exception is raised here.

    `inner`: how many neighbouring ranks form the second dim, where the ranks are used as a mesh of two.
    """
    stage = _Stage(num_ranks, seed, inner)
    results: dict[int, T] = {}
    # what is in force around the call; a thread starts without it
    autocast = [(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)) for device in _devices()]

    def work(rank: int) -> None:
        try:
            stage.start(rank)
            with ExitStack() as stack:
                for mesh in stage.mesh_of(rank):
                    stack.enter_context(pretend(mesh.group, mesh.rank))
                for of_device in autocast:
                    stack.enter_context(torch.autocast(*of_device))
                # a backward on a GPU would run in the one thread of that device, where no rank could wait for another
                stack.enter_context(torch.autograd.set_multithreading_enabled(False))
                stack.enter_context(_Collectives(stage, rank))
                results[rank] = run(rank)
        except BaseException as error:
            stage.errors[rank] = error
        finally:
            stage.finish(rank)

    state = _random_state()
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(num_ranks)]
    try:
        for thread in threads:
            thread.start()
        stage.wait_for(num_ranks)
    except BaseException:  # Ctrl-C
        stage.abandon()
        stage.wait_for(sum(thread.ident is not None for thread in threads))
        raise
    finally:
        _restore(state)
    for thread in threads:
        thread.join()
    for rank, error in stage.errors.items():
        if hasattr(error, "add_note"):  # from Python 3.11 on
            error.add_note(f"on rank {rank} of {num_ranks} in lockstep, seed {seed}")
        raise error
    return [results[rank] for rank in range(num_ranks)]
