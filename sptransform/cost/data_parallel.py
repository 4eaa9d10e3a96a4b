"""What parameters in parts add to a step: a rank keeps a part of each unit's, gathered before each use (ZeRO-3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from sptransform.cost.records import Message, Step, Work


def with_parameter_shards(
    step: Step, ranks: Sequence[int], units: Mapping[str, int], *, itemsize: int = 2, kept: int = 2, reduced: int = 4
) -> Step:
    """The step of a rank that keeps 1/N of the parameters, and of their gradients, as FSDP does.

    Each unit's parameters are gathered before its forward and before its backward, one unit ahead, and its gradients
    are reduced and scattered after its backward (Rajbhandari et al., ZeRO, arXiv 1910.02054, §5.3).

    Args:
        step: with whole parameters. Equal layers may stand for several.
        ranks: the N global ranks that share the parameters.
        units: module path -> number of parameters; "" is what no other path begins. In the order of the forward.
        itemsize: bytes of a parameter as it is gathered and computed with.
        kept: bytes of a parameter as its owner keeps it; its gradient is kept in as many.
        reduced: bytes of a gradient as it is reduced.
    """
    size = len(ranks)
    works: list[Work] = []
    for direction in ("forward", "backward"):
        own = [work for work in step.works if work.direction == direction]
        works += _gathered(own, _visits(own, units), units, ranks, (itemsize, kept, reduced))
    copies = {
        unit: max((work.copies for work in step.works if _unit(work, units) == unit), default=1) for unit in units
    }
    count = sum(number * copies[unit] for unit, number in units.items())
    whole = itemsize * count
    buffers = max(step.parameters - whole, 0)
    shard = -(-count // size) * kept
    return replace(step, works=tuple(works), parameters=buffers + shard, gradients=shard)


def _unit(work: Work, units: Mapping[str, int]) -> str:
    inside = (unit for unit in units if unit and (work.layer == unit or work.layer.startswith(f"{unit}.")))
    return max(inside, key=len, default="")


def _visits(works: Sequence[Work], units: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """(unit, index of its first work, index of its last) in the order in which works of this direction need them."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, work in enumerate(works):
        unit = _unit(work, units)
        first.setdefault(unit, index)
        last[unit] = index
    return sorted(((unit, first[unit], last[unit]) for unit in first if units.get(unit)), key=lambda visit: visit[1])


def _gathered(
    works: Sequence[Work],
    visits: Sequence[tuple[str, int, int]],
    units: Mapping[str, int],
    ranks: Sequence[int],
    sizes: tuple[int, int, int],
) -> list[Work]:
    """The works with the messages of each unit around its own."""
    itemsize, kept, reduced = sizes
    before: dict[int, list[Work]] = {}
    after: dict[int, list[Work]] = {}
    freed: dict[int, int] = {}
    for place, (unit, first, last) in enumerate(visits):
        whole, like = units[unit] * itemsize, works[first]
        gather = _message("all_gather", whole, ranks)
        before[first] = [_work("wait", like, gather, allocates=(whole,))]
        if place == 0:
            before[first].insert(0, replace(_work("message", like, gather), copies=1, run=""))
        if place + 1 < len(visits):
            ahead = units[visits[place + 1][0]]
            before[first].append(_work("message", like, _message("all_gather", ahead * itemsize, ranks)))
        freed[last] = whole
        if like.direction == "backward":
            # the whole gradients, which the unit's own works made, become a part
            part = -(-units[unit] // len(ranks)) * kept
            scatter = _message("reduce_scatter", units[unit] * reduced, ranks)
            after[last] = [_work("message", works[last], scatter, allocates=(part,), frees=(whole,))]
    found: list[Work] = []
    for index, work in enumerate(works):
        work = replace(work, frees=(*work.frees, freed[index])) if index in freed else work
        found += [*before.get(index, ()), work, *after.get(index, ())]
    return found


def _message(kind: str, size: int, ranks: Sequence[int]) -> Message:
    return Message(kind, size * (len(ranks) - 1) // len(ranks), tuple(ranks))


def _work(
    kind: str, like: Work, message: Message, allocates: tuple[int, ...] = (), frees: tuple[int, ...] = ()
) -> Work:
    """The start of a message, or its end, in the layer that ``like`` is of."""
    name = f"{like.layer or 'model'}.{message.kind}"
    return Work(
        name,
        message.kind,
        kind,
        like.direction,
        like.layer,
        message=message,
        allocates=allocates,
        frees=frees,
        copies=like.copies,
        run=like.run,
    )
