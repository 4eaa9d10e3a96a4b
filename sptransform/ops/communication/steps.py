"""Ops that communicate while they run, written as generators that yield what they send, and drivers for these.

    def steps(rank, x, group_name):
        pending = yield Start(x, sent, received)   # on its way from here on
        ...                                        # work meanwhile
        came = yield Wait(pending)
        return came

One generator serves real groups (:func:`perform`), all ranks simulated in one process (:func:`perform_together`),
and any other driver that answers ``Start`` and ``Wait``. It does not know how bytes travel.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from sptransform.ops.communication.complex_numbers import as_received, as_sent
from sptransform.ops.groups import rank_in
from sptransform.ops.library import primitive

T = TypeVar("T")


@dataclass(frozen=True)
class Start:
    """Begin to send ``sent[j]`` entries of the 1-D tensor ``x`` to rank j, in rank order.

    ``received[i]`` entries come from rank i. The answer is the ``pending`` of a later :class:`Wait`.
    """

    x: Tensor
    sent: list[int]
    received: list[int]


@dataclass(frozen=True)
class Wait:
    """The answer is the received 1-D tensor: the entries from rank 0, 1, .. one after the other."""

    pending: Any


Steps = Generator[Start | Wait, Any, T]

# op name -> its generator function of (rank, *arguments)
COMMUNICATING: dict[str, Callable[..., Steps[Any]]] = {}


def communicating(
    schema: str, *, fake: Callable[..., Any], tags: tuple[torch.Tag, ...] = ()
) -> Callable[[Callable[..., Steps[T]]], Callable[..., Steps[T]]]:
    """Register an op whose steps are the decorated generator of ``(rank, *arguments, **keywords)``.

    The schema has an argument ``group_name``; "" is a group of this process alone.
    """

    def register(steps: Callable[..., Steps[T]]) -> Callable[..., Steps[T]]:
        name = schema.split("(", 1)[0]

        def run(*args: Any, **kwargs: Any) -> T:
            group = group_of(name, args, kwargs)
            return perform(steps(rank_in(group) if group else 0, *args, **kwargs), group)

        primitive(schema, fake=fake, tags=tags)(run)
        COMMUNICATING[name] = steps
        return steps

    return register


def group_of(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """The ``group_name`` argument of a call of the op."""
    if "group_name" in kwargs:
        return kwargs["group_name"]
    arguments = getattr(torch.ops.sptransform, name).default._schema.arguments
    at = next(i for i, argument in enumerate(arguments) if argument.name == "group_name")
    return args[at] if at < len(args) and not arguments[at].kwarg_only else arguments[at].default_value


def drive(steps: Steps[T], start: Callable[[Start], Any], wait: Callable[[Any], Tensor]) -> T:
    """Run ``steps`` to their end, answering every request; returns what they return."""
    answer = None
    while True:
        try:
            asked = steps.send(answer)
        except StopIteration as end:
            return end.value
        answer = start(asked) if isinstance(asked, Start) else wait(asked.pending)


def perform(steps: Steps[T], group: str) -> T:
    """Run ``steps`` on a process group; started messages travel while the steps go on."""
    c10d = torch.ops._c10d_functional

    def start(asked: Start) -> tuple[Tensor, bool]:
        return c10d.all_to_all_single(as_sent(asked.x), asked.received, asked.sent, group), asked.x.is_complex()

    return drive(steps, start, lambda pending: as_received(c10d.wait_tensor(pending[0]), pending[1]))


def perform_together(steps: Mapping[int, Steps[T]]) -> dict[int, T]:
    """Run every rank's ``steps`` in this process; returns what each returns. Ranks are ``0 .. len(steps) - 1``."""
    answers: dict[int, Any] = dict.fromkeys(steps)
    results: dict[int, T] = {}
    while len(results) < len(steps):
        asked: dict[int, Start | Wait] = {}
        for rank, own in steps.items():
            try:
                asked[rank] = own.send(answers[rank])
            except StopIteration as end:
                results[rank] = end.value
        kinds = {type(x) for x in asked.values()}
        assert len(kinds) <= 1 and len(asked) in (0, len(steps)), "ranks take different steps"
        if kinds == {Wait}:
            answers = {rank: x.pending for rank, x in asked.items()}
        elif kinds:
            answers = deliver(asked)
    return results


def deliver(asked: Mapping[int, Start]) -> dict[int, Tensor]:
    """What every rank receives when all ranks send what they asked to."""
    pieces = {rank: list(x.x.split(x.sent)) for rank, x in asked.items()}
    came = {}
    for rank, x in asked.items():
        mine = [pieces[other][rank] for other in sorted(asked)]
        assert [len(piece) for piece in mine] == list(x.received), f"rank {rank} expects {x.received}"
        came[rank] = torch.cat(mine)
    return came
