"""One captured graph under one strategy after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import fx

# Private: capture reads Dynamo's fake mode, and its symbols, from here; a trial must not add guards to these
from torch._guards import tracing
from torch.distributed.tensor import DTensor

from sptransform.capture.lengths import has_symbolic_sizes
from sptransform.compiler.options import Options
from sptransform.engine.strategy import Strategy
from sptransform.sharding.mesh import Mesh

T = TypeVar("T")


def trials(
    rewrite: Callable[[Mesh, fx.GraphModule, list[Any], Options], T],
    gm: fx.GraphModule,
    inputs: list[Any],
    options: Options,
    mesh: Mesh,
) -> Callable[[Strategy, tuple[int, ...], int], T]:
    """What ``rewrite`` makes of Dynamo's ``gm`` for (a strategy, the ranks of each mesh dim, a rank).

    ``gm`` stays as it is, and nothing is run. Lengths that Dynamo left open are those of ``inputs``. If some inputs are
    in parts on the ranks of ``mesh``, the graphs are for this rank of it, else for pretended ranks.
    """
    in_parts = mesh.device_mesh is not None and any(isinstance(x, DTensor) for x in inputs)

    def trial(strategy: Strategy, shape: tuple[int, ...], rank: int) -> T:
        own = fx.GraphModule(gm, copy.deepcopy(gm.graph))
        chosen = replace(options, strategy=strategy)
        on = strategy.mesh_of(mesh.device_mesh) if in_parts else strategy.pretended_mesh(shape, rank)
        with _lengths_as_given(own):
            return rewrite(on, own, list(map(_number, inputs)), chosen)

    return trial


@contextmanager
def _lengths_as_given(gm: fx.GraphModule) -> Iterator[None]:
    """Within, ``gm`` is captured for the lengths of its inputs, in a fake mode of its own if Dynamo left some open."""
    if not has_symbolic_sizes(gm):
        yield
        return
    for node in gm.graph.find_nodes(op="placeholder"):
        node.meta.pop("example_value", None)
    with tracing(None):
        yield


def _number(x: Any) -> Any:
    return x.node.hint if isinstance(x, torch.SymInt) else x
