"""Rewritten graphs that run: the graph `rewrite` shows, together with what Dynamo would call it with.

A graph takes Dynamo's inputs, parameters among them, in Dynamo's order; only a `torch.compile` backend sees them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import fx, nn

from sptransform.compiler.options import Options
from sptransform.compiler.rewrite import Rewritten, rewrite_graph, rewritten_for
from sptransform.sharding.mesh import Mesh
from sptransform.strategies.names import StrategyLike
from sptransform.testing.pretended import Asked, Ranks, Runnable, for_ranks, forward_and_backward, parameter_names
from sptransform.testing.pretended import on_pretended_ranks as on_pretended_ranks
from tests.support.equality import Result
from tests.support.graphs import DynamoGraph, dynamo_graph, while_captured
from tests.support.models import LAYERS, Inputs, build
from tests.support.simulated import per_rank, simulate, to_ranks


def runnables(model: nn.Module, inputs: Inputs, meshes: Sequence[Mesh], **options: Any) -> list[Runnable]:
    """The model's graph, captured once and rewritten for each of `meshes`, whose groups need not exist yet."""

    def use(gm: fx.GraphModule, example_inputs: list[Any]) -> list[Runnable]:
        return _for_meshes(gm, example_inputs, parameter_names(model, example_inputs), meshes, options)

    return while_captured(model, use, **inputs)


def simulated_graph(name: str, num_ranks: int) -> Runnable:
    """The named model's graph for a simulated group of this size."""
    with simulate(2):
        group = dist.group.WORLD.group_name  # the same in every simulation
    (graph,) = model_for_meshes(name, [Mesh(num_ranks, 0, group)], outputs="dtensor")
    return graph


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
    return [Result(losses[r], {name: grad[r] for name, grad in grads.items()}, rank=r) for r in range(num_ranks)]


def _on_ranks(x: Any, num_ranks: int) -> Any:
    return to_ranks(x, num_ranks, requires_grad=x.requires_grad) if isinstance(x, torch.Tensor) else x


@functools.cache
def dynamo_graph_of(name: str, layers: int, seq_len: int) -> tuple[DynamoGraph, list[str | None]]:
    """The graph of a model of `tests/support/models.py`, made once, and its inputs' parameter names."""
    model, inputs = build(name, layers=layers, seq_len=seq_len)
    graph = dynamo_graph(model, **inputs)
    return graph, parameter_names(model, graph.inputs)


def model_on_pretended_ranks(
    name: str, asked: Sequence[Asked], *, layers: int = LAYERS, seq_len: int = 64, **options: Any
) -> dict[Asked, Ranks]:
    """As `on_pretended_ranks`, of a model of `tests/support/models.py`."""
    graph, names = dynamo_graph_of(name, layers, seq_len)
    return {
        each: graph.use(lambda gm, inputs, each=each: for_ranks(gm, inputs, names, each, None, options))
        for each in asked
    }


def model_for_meshes(name: str, meshes: Sequence[Mesh], **options: Any) -> list[Runnable]:
    """A model's graph rewritten for each of `meshes`, whose groups need not exist yet."""
    graph, names = dynamo_graph_of(name, LAYERS, 64)
    return graph.use(lambda gm, inputs: _for_meshes(gm, inputs, names, meshes, options))


def rewritten_model(
    name: str,
    strategy: StrategyLike,
    world_size: int | tuple[int, ...],
    *,
    rank: int = 0,
    layers: int = LAYERS,
    seq_len: int = 64,
    **options: Any,
) -> Rewritten:
    """What `sptransform.rewrite` gives of a model of `tests/support/models.py`."""
    graph, _ = dynamo_graph_of(name, layers, seq_len)
    chosen = Options.of({"outputs": "dtensor", **options, "strategy": strategy})
    mesh = chosen.strategy.pretended_mesh(world_size, rank)
    return graph.use(lambda gm, inputs: rewritten_for(mesh, gm, inputs, chosen))


def _for_meshes(
    gm: fx.GraphModule, inputs: list[Any], names: list[str | None], meshes: Sequence[Mesh], options: dict[str, Any]
) -> list[Runnable]:
    found = (rewrite_graph(gm, inputs, Options(**options), mesh) for mesh in meshes)
    return [Runnable(rewritten, context, list(inputs), names) for rewritten, context in found]


def function_on_ranks(function: Callable[..., Any], inputs: Sequence[Any], asked: Asked, **options: Any) -> Ranks:
    """The same of a function that needs no Dynamo: it reads nothing but its inputs."""
    graph = fx.Graph()
    placeholders = [graph.placeholder(f"x{i}") for i in range(len(inputs))]
    graph.output((graph.call_function(function, tuple(placeholders)),))
    names = [None] * len(inputs)
    return for_ranks(fx.GraphModule({}, graph), list(inputs), names, asked, None, {"outputs": "full"} | options)


def step_of_first_scalar(graph: Runnable) -> Result:
    """One step of a graph that returns its loss, and then scalars that are parts of it."""
    return forward_and_backward(
        graph, lambda outputs: next(x for x in outputs if isinstance(x, torch.Tensor) and x.ndim == 0)
    )
