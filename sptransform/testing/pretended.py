"""Rewritten graphs of all ranks, pretended in one process, with the inputs that Dynamo would call them with.

A graph takes Dynamo's inputs, parameters among them, in Dynamo's order; only a `torch.compile` backend sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeVar

import torch
from torch import fx, nn

from sptransform.compiler.options import Options
from sptransform.compiler.rewrite import rewrite_graph, settled
from sptransform.engine.context import Context
from sptransform.ops.groups import pretend
from sptransform.sharding.mesh import Mesh
from sptransform.strategies.names import StrategyLike
from sptransform.testing.capturing import copied, while_captured
from sptransform.testing.equality import Result
from sptransform.testing.lockstep import in_lockstep

T = TypeVar("T")
Compiler = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Runnable:
    """A rewritten graph, its inputs, and what it was compiled to; `names` has an input's name if it is a parameter."""

    graph_module: fx.GraphModule
    context: Context
    inputs: list[Any]
    names: list[str | None]
    compiled: Callable[..., Any] | None = None

    @property
    def call(self) -> Callable[..., Any]:
        return self.compiled or self.graph_module


@dataclass(frozen=True)
class Ranks:
    """The rewritten graph of every rank, pretended; the same object where all ranks have the same."""

    graphs: list[Runnable]

    @property
    def context(self) -> Context:
        return self.graphs[0].context

    def run(self, call: Callable[[Runnable], T], seed: int = 0) -> list[T]:
        """``call`` with its graph on every rank, in lockstep."""
        parts = self.context.result.mesh_dims
        inner = parts[1].mesh.size if len(parts) == 2 else 1
        return in_lockstep(len(self.graphs), lambda rank: call(self.graphs[rank]), seed=seed, inner=inner)

    def results(self) -> list[Result]:
        """One forward and backward; of what the graph returns, the loss is the scalar."""
        return [replace(result, rank=rank) for rank, result in enumerate(self.run(forward_and_backward))]


@dataclass(frozen=True)
class Asked:
    """A strategy on a number of ranks; of a mesh of two dims, on so many of each."""

    num_ranks: int | tuple[int, ...]
    strategy: StrategyLike

    def __str__(self) -> str:
        return f"{self.strategy} on {self.num_ranks}"


def on_pretended_ranks(
    model: nn.Module, inputs: dict[str, Any], asked: Sequence[Asked], compiler: Compiler | None = None, **options: Any
) -> dict[Asked, Ranks]:
    """The model's graphs for all that is asked, captured once; one for all ranks where these share evenly.

    ``compiler`` is an inner backend; without, graphs run as they are.
    """

    def use(gm: fx.GraphModule, example_inputs: list[Any]) -> dict[Asked, Ranks]:
        names = parameter_names(model, example_inputs)
        return {each: for_ranks(gm, example_inputs, names, each, compiler, options) for each in asked}

    return while_captured(model, use, **inputs)


def parameter_names(model: nn.Module, inputs: Sequence[Any]) -> list[str | None]:
    by_identity = {id(parameter): name for name, parameter in model.named_parameters()}
    return [by_identity.get(id(x)) for x in inputs]


def for_ranks(
    gm: fx.GraphModule,
    inputs: list[Any],
    names: list[str | None],
    asked: Asked,
    compiler: Compiler | None,
    options: dict[str, Any],
) -> Ranks:
    request = Options(**{"strategy": asked.strategy, "outputs": "dtensor"} | options)
    graphs: list[Runnable] = []
    shape = asked.num_ranks if isinstance(asked.num_ranks, tuple) else (asked.num_ranks,)
    request = settled(request, Mesh.pretended(shape), gm, inputs)
    for rank in range(prod(shape)):
        if graphs and all(part.result.is_even for part in graphs[0].context.result.mesh_dims):
            graphs.append(graphs[0])
        else:
            made, context = rewrite_graph(gm, inputs, request, Mesh.pretended(shape, rank))
            with ExitStack() as stack:
                for part in context.result.mesh_dims:
                    stack.enter_context(pretend(part.mesh.group, part.mesh.rank))
                call = None if compiler is None else compiler(made, inputs)
            graphs.append(Runnable(made, context, inputs, names, call))
    return Ranks(graphs)


def the_scalar(outputs: Sequence[Any]) -> torch.Tensor:
    (found,) = [x for x in outputs if isinstance(x, torch.Tensor) and x.ndim == 0]
    return found


def forward_and_backward(graph: Runnable, loss_of: Callable[[Sequence[Any]], torch.Tensor] = the_scalar) -> Result:
    """One step on copies of the graph's inputs; ``loss_of`` picks the loss among what the graph returns."""
    arguments = copied(graph.inputs)
    loss = loss_of(graph.call(*arguments))
    loss.backward()
    pairs = zip(graph.names, arguments, strict=True)
    return Result(loss.detach(), {name: x.grad for name, x in pairs if name is not None and x.grad is not None})
