"""``rewrite``: what parallelize would compile, as a graph to read. Needs no processes and runs no model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from sptransform import annotations
from sptransform.backend import rewrite_graph
from sptransform.errors import SPTransformError
from sptransform.explain.counting import Collective, count_collectives
from sptransform.mesh import Mesh
from sptransform.options import Options
from sptransform.parallelize import configured
from sptransform.pass_manager import Context
from sptransform.printer import text
from sptransform.strategies import Strategy


@dataclass(frozen=True)
class Rewritten:
    """One rank's rewritten graph.

    Attributes:
        graph_module: runnable where the process group exists.
        context: the request and what the passes found (``fallbacks``, ``output_placements``).
    """

    graph_module: fx.GraphModule
    context: Context

    def text(self, layer: str | None = None) -> str:
        """The graph, one line a node; with ``layer`` only the nodes of that module path, and what is inside it."""
        nodes = list(self.graph_module.graph.nodes)
        if layer is not None:
            inside = (annotations.module_path(node) for node in nodes)
            nodes = [n for n, path in zip(nodes, inside, strict=True) if path == layer or path.startswith(f"{layer}.")]
        return text(nodes, is_local=True)

    def collectives(self) -> list[Collective]:
        """Every collective of one training step, forward and backward, with the bytes each rank sends."""
        return count_collectives(self.graph_module.graph, self.context.mesh)

    def __str__(self) -> str:
        return self.text()


class _Stop(SPTransformError):
    """Ends the model's call once its graph is rewritten; raised while compiling, so that Dynamo caches nothing."""


def rewrite(
    model: nn.Module,
    strategy: str | Strategy,
    inputs: Mapping[str, Any] | tuple[Any, ...],
    *,
    world_size: int,
    rank: int = 0,
    **options: Any,
) -> Rewritten:
    """Return the graph ``rank`` of ``world_size`` would run, without processes; the model is not run or changed.

    Args:
        model: the unmodified module.
        strategy: as for :func:`parallelize`.
        inputs: keyword arguments (a mapping) or positional ones (a tuple) of the model's forward.
        world_size: number of ranks.
        rank: whose graph; with even partitions all ranks have the same.
        options: further options of :func:`parallelize` (``outputs``, ``grad_sync``, ``strict``, ``sequence_dims``).

    Raises:
        UsageError: an argument is wrong.
    """
    chosen = Options.of({"outputs": "dtensor", **options, "strategy": strategy})
    mesh = Mesh.pretended(world_size, rank)
    found: list[Rewritten] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        found.append(Rewritten(*rewrite_graph(gm, example_inputs, chosen, mesh)))
        raise _Stop

    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    with suppress(_Stop):
        configured(compiled)(*args, **kwargs)
    return found[0]

