"""How often one model may be compiled: as often as Dynamo allows, and once more for every further size of its inputs.

A graph serves all lengths that the ranks share evenly, and any other length is a graph of its own. There may be many of
those in a run. Dynamo's limit of recompiles is meant for what a graph should not depend on, such as a number that
changes at every step. Each model has a limit of its own (:func:`~sptransform.capture.torch_versions.own_limit`); a
second one is for all models of a class.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import fx

# Private: Dynamo's number of the code object that it compiles, by which it counts too
from torch._guards import CompileContext

log = logging.getLogger(__name__)

Sizes = tuple[tuple[int | None, ...], ...]


class Compiles:
    """The sizes of inputs that the graphs of one model are for, as long as Dynamo keeps these graphs."""

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[Callable[..., Any], tuple[int | None, Sizes]] = WeakKeyDictionary()
        self._has_warned = False
        _live.add(self)

    def add(self, compiled: Callable[..., Any], gm: fx.GraphModule) -> None:
        """Remember that ``gm`` was just compiled, which Dynamo calls as ``compiled``."""
        compile_id = CompileContext.current_compile_id()
        self._kept[compiled] = (None if compile_id is None else compile_id.frame_id), _fixed(gm)

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Dynamo's limits, beyond which a call is an error, raised by the number of further sizes so far."""
        config, num_sizes = torch._dynamo.config, self.num_sizes()
        of_all = sum(each.num_sizes() for each in _live)
        if num_sizes > config.recompile_limit and not self._has_warned:
            self._has_warned = True
            log.warning(
                "the model was compiled for more than %d different sizes of its inputs: pad lengths to a multiple of "
                "the number of ranks, of twice that number under a zigzag ring, and one graph serves them all",
                config.recompile_limit,
            )
        with config.patch(
            recompile_limit=config.recompile_limit + max(num_sizes - 1, 0),
            accumulated_recompile_limit=config.accumulated_recompile_limit + max(of_all - 1, 0),
        ):
            yield

    def num_sizes(self) -> int:
        """Of the code object that was compiled for the most different ones: with graph breaks there are several."""
        of_frames = Counter(frame for frame, _ in set(self._kept.values()))
        return max(of_frames.values(), default=0)


_live: WeakSet[Compiles] = WeakSet()


def _fixed(gm: fx.GraphModule) -> Sizes:
    """The sizes of all tensors; None for one that the graph leaves open."""

    def fixed(size: int | torch.SymInt) -> int | None:
        if not isinstance(size, torch.SymInt):
            return size
        return int(size.node.expr) if size.node.expr.is_number else None

    # Dynamo calls a backend with tensors as they are; what it left open is among the fake ones
    examples = (node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder"))
    return tuple(tuple(map(fixed, x.shape)) for x in examples if isinstance(x, torch.Tensor))
