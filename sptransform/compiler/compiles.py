"""How often one model is compiled: for any number of sizes, but for each only as often as Dynamo allows.

A graph serves all lengths that the ranks share evenly, and any other length is a graph of its own. There may be many of
those in a run, which Dynamo's limit of recompiles would refuse. That limit is meant for what a graph should not depend
on, such as a number that changes at every step, and it still holds for inputs of the same sizes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch

# Private: Dynamo's number of the code object that it compiles, by which it counts too
from torch._guards import CompileContext

from sptransform.diagnostics.errors import UsageError, describe

log = logging.getLogger(__name__)

Sizes = tuple[tuple[int | None, ...], ...]

_UNLIMITED = 2**31 - 1
_limit: ContextVar[int | None] = ContextVar("limit of compiles for the same sizes", default=None)


@contextmanager
def counted_by_sizes() -> Iterator[None]:
    """Dynamo does not count in here; :class:`Compiles` does, up to the limit that was configured outside."""
    limit = torch._dynamo.config.recompile_limit if _limit.get() is None else _limit.get()
    token = _limit.set(limit)
    try:
        with torch._dynamo.config.patch(recompile_limit=_UNLIMITED, accumulated_recompile_limit=_UNLIMITED):
            yield
    finally:
        _limit.reset(token)


class Compiles:
    """The graphs of one model, counted by the code that they were made of and the sizes that they are for.

    As long as Dynamo keeps them: after ``torch._dynamo.reset()`` they do not count, nor do those that were refused.
    """

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[Callable[..., Any], tuple[int | None, Sizes]] = WeakKeyDictionary()
        self._has_warned = False

    def add(self, compiled: Callable[..., Any], inputs: Sequence[Any]) -> None:
        """Count the graph that was just compiled for ``inputs``, which Dynamo calls as ``compiled``.

        Raises:
            UsageError: there are too many for the same sizes.
        """
        limit, compile_id = _limit.get(), CompileContext.current_compile_id()
        if limit is None or compile_id is None:
            return
        frame, sizes = compile_id.frame_id, _fixed(inputs)
        kept = [of for of in self._kept.values() if of[0] == frame]
        if kept.count((frame, sizes)) >= limit:
            raise UsageError(
                describe(
                    "the model was compiled as often for inputs of the same sizes as Dynamo allows",
                    found=f"{limit} graphs, which differ in something else",
                    fix="pass numbers that change as tensors; or raise torch._dynamo.config.recompile_limit",
                )
            )
        self._kept[compiled] = frame, sizes
        if not self._has_warned and len({*kept, (frame, sizes)}) > limit:
            self._has_warned = True
            log.warning(
                "the model was compiled for more than %d different sizes of its inputs: pad lengths to a multiple of "
                "the number of ranks, of twice that number under a zigzag ring, and one graph serves them all",
                limit,
            )


def _fixed(inputs: Sequence[Any]) -> Sizes:
    """The sizes of all tensors; None for one that the graph leaves open."""

    def fixed(size: int | torch.SymInt) -> int | None:
        if not isinstance(size, torch.SymInt):
            return size
        return int(size.node.expr) if size.node.expr.is_number else None

    return tuple(tuple(map(fixed, x.shape)) for x in inputs if isinstance(x, torch.Tensor))
