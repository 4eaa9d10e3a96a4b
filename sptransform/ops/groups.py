"""This process's rank in a group: the real rank, found by group name, or a pretended one if there are no processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import reduce

from torch.distributed import ProcessGroup, distributed_c10d, get_process_group_ranks, get_rank, is_initialized

_pretended: ContextVar[dict[str, int]] = ContextVar("sptransform_pretended_ranks", default={})  # noqa: B039


def rank_in(group: str) -> int:
    """This process's rank in the group of that name."""
    pretended = _pretended.get()
    return pretended[group] if group in pretended else group_called(group).rank()


def process() -> int:
    """This process's number among all of them; if ranks are pretended, one for each combination."""
    pretended = _pretended.get()
    if pretended:
        return reduce(lambda number, rank: number << 20 | rank, pretended.values())
    return get_rank() if is_initialized() else 0


def ranks_in(group: str) -> tuple[int, ...]:
    """The global ranks of the group of that name, in its order."""
    return tuple(get_process_group_ranks(group_called(group)))


def group_called(name: str) -> ProcessGroup:
    """The process group of that name."""
    # a graph stores only the name of a group; only the resolver maps it back to the group
    return distributed_c10d._resolve_process_group(name)


@contextmanager
def pretend(group: str, rank: int) -> Iterator[None]:
    """Within the block, ``rank_in(group)`` is ``rank``: graphs can be made and checked with no processes."""
    token = _pretended.set({**_pretended.get(), group: rank})
    try:
        yield
    finally:
        _pretended.reset(token)
