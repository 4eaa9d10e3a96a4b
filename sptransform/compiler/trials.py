"""One captured graph under one strategy after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

import torch
from torch import fx

# Private: capture reads Dynamo's fake mode, and its symbols, from here; a trial must not add guards to these
from torch._guards import tracing
from torch.distributed.tensor import DTensor

from sptransform.capture.capture import capture
from sptransform.capture.lengths import has_symbolic_sizes
from sptransform.compiler.options import Options
from sptransform.engine.strategy import Strategy
from sptransform.graph import notes
from sptransform.sharding.mesh import Mesh

T = TypeVar("T")
# Dynamo's graph and its inputs -> the captured graph
Capture = Callable[[fx.GraphModule, Sequence[Any]], fx.GraphModule]


def trials(
    rewrite: Callable[[Mesh, fx.GraphModule, list[Any], Options, Capture], T],
    gm: fx.GraphModule,
    inputs: list[Any],
    options: Options,
    mesh: Mesh,
) -> Callable[[Strategy, tuple[int, ...], int], T]:
    """What ``rewrite`` makes of Dynamo's ``gm`` for (a strategy, the ranks of each mesh dim, a rank).

    ``gm`` stays as it is, and nothing is run. It is captured once: ``rewrite`` gets a function that gives a copy of the
    captured graph. Lengths that Dynamo left open are those of ``inputs``. If some inputs are in parts on the ranks of
    ``mesh``, the graphs are for this rank of it, else for pretended ranks.
    """
    in_parts = mesh.device_mesh is not None and any(isinstance(x, DTensor) for x in inputs)
    own = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    given = list(map(_number, inputs))
    is_open = has_symbolic_sizes(gm)
    if is_open:
        for node in own.graph.find_nodes(op="placeholder"):
            node.meta.pop("example_value", None)

    @cache
    def captured() -> fx.GraphModule:
        return capture(own, given)

    def trial(strategy: Strategy, shape: tuple[int, ...], rank: int) -> T:
        chosen = replace(options, strategy=strategy)
        on = strategy.mesh_of(mesh.device_mesh) if in_parts else strategy.pretended_mesh(shape, rank)
        # a fake mode of its own if Dynamo left lengths open
        with tracing(None) if is_open else nullcontext():
            return rewrite(on, own, given, chosen, lambda *_: notes.copied(captured()))

    return trial


def _number(x: Any) -> Any:
    return x.node.hint if isinstance(x, torch.SymInt) else x
