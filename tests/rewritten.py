"""Rewritten graphs that run: the graph `rewrite` shows, together with what Dynamo would call it with.

A graph takes Dynamo's inputs, parameters among them, in Dynamo's order; only a `torch.compile` backend sees them.
"""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import fx, nn

from sptransform.backend import rewrite_graph
from sptransform.dynamo import configured
from sptransform.mesh import Mesh
from sptransform.options import Options
from sptransform.pass_manager import Context
from tests.equality import Result
from tests.models import Inputs, build
from tests.simulated import per_rank, simulate, to_ranks


@dataclass(frozen=True)
class Runnable:
    """A rewritten graph and its inputs; `names` has the parameter's name where an input is one."""

    graph_module: fx.GraphModule
    context: Context
    inputs: list[Any]
    names: list[str | None]


class _Stop(Exception):
    """Ends the model's call once its graphs are rewritten."""


def runnables(model: nn.Module, inputs: Inputs, meshes: Sequence[Mesh], **options: Any) -> list[Runnable]:
    """The model's graph, captured once and rewritten for each of `meshes`, whose groups need not exist yet."""
    found: list[Runnable] = []
    by_identity = {id(parameter): name for name, parameter in model.named_parameters()}

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        names = [by_identity.get(id(x)) for x in example_inputs]
        for mesh in meshes:
            rewritten, context = rewrite_graph(gm, example_inputs, Options(**options), mesh)
            found.append(Runnable(rewritten, context, list(example_inputs), names))
        return _stop

    torch._dynamo.reset()
    with contextlib.suppress(_Stop):
        configured(torch.compile(model, backend=backend, fullgraph=True, dynamic=False))(**inputs)
    return found


def _stop(*args: Any) -> Any:
    raise _Stop


@functools.cache
def simulated_graphs(name: str, world_sizes: tuple[int, ...]) -> dict[int, Runnable]:
    """The named model's graphs for simulated groups of these sizes."""
    with simulate(2):
        group = dist.group.WORLD.group_name  # the same in every simulation
    meshes = [Mesh(num_ranks, 0, group) for num_ranks in world_sizes]
    return dict(zip(world_sizes, runnables(*build(name), meshes, outputs="dtensor"), strict=True))


def run_on_ranks(graph: Runnable, num_ranks: int) -> list[Result]:
    """One forward and backward on simulated ranks. The loss is the scalar that the graph returns."""
    with simulate(num_ranks):
        arguments = [_on_ranks(x, num_ranks) for x in graph.inputs]
        (loss,) = [x for x in graph.graph_module(*arguments) if isinstance(x, torch.Tensor) and x.ndim == 0]
        loss.backward()
        losses = per_rank(loss)
        grads = {
            name: per_rank(argument.grad)
            for name, argument in zip(graph.names, arguments, strict=True)
            if name is not None and argument.grad is not None
        }
    return [Result(losses[r], {name: grad[r] for name, grad in grads.items()}) for r in range(num_ranks)]


def _on_ranks(x: Any, num_ranks: int) -> Any:
    return to_ranks(x, num_ranks, requires_grad=x.requires_grad) if isinstance(x, torch.Tensor) else x
