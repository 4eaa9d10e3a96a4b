"""Who am I in a process group: a real group by its name, or a pretended rank where there are no processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch.distributed import ProcessGroup, distributed_c10d, get_process_group_ranks

_pretended: ContextVar[dict[str, int]] = ContextVar("sptransform_pretended_ranks", default={})  # noqa: B039


def rank_in(group: str) -> int:
    """This process's rank in the group of that name."""
    pretended = _pretended.get()
    return pretended[group] if group in pretended else group_called(group).rank()


def ranks_in(group: str) -> tuple[int, ...]:
    """The global ranks of the group of that name, in its order."""
    return tuple(get_process_group_ranks(group_called(group)))


def group_called(name: str) -> ProcessGroup:
    """The process group of that name."""
    # the name is what a graph holds of a group; only the resolver turns it back
    return distributed_c10d._resolve_process_group(name)


@contextmanager
def pretend(group: str, rank: int) -> Iterator[None]:
    """Within the block, ``rank_in(group)`` is ``rank``: graphs can be made and checked with no processes."""
    token = _pretended.set({**_pretended.get(), group: rank})
    try:
        yield
    finally:
        _pretended.reset(token)
