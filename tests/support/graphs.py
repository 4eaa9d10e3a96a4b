"""A model's captured graph, and what becomes of it: run as captured, after some passes, or on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

# Private: the registry behind torch.compile(backend="name"), as the library uses it.
from torch._dynamo.backends.registry import lookup_backend

# Private: the fake mode of Dynamo's graph, without which it cannot be traced again.
from torch._guards import TracingContext

import sptransform.ops  # noqa: F401 - registers the ops a rewritten graph calls
from sptransform.capture.capture import capture
from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass, run_passes
from sptransform.op_rules import DEFAULT_RULES
from sptransform.ops.groups import pretend
from sptransform.passes import PIPELINE
from sptransform.sharding.mesh import PRETENDED_GROUP, Mesh
from sptransform.strategies.ulysses import Ulysses
from sptransform.testing.capturing import compiled_with as compiled_with
from sptransform.testing.capturing import copied, while_captured
from sptransform.testing.lockstep import in_lockstep

Tensors = list[torch.Tensor | None]


@dataclass(frozen=True)
class DynamoGraph:
    """What Dynamo makes of one call of a model. It depends on no strategy and no number of ranks."""

    graph_module: fx.GraphModule
    inputs: list[Any]
    context: TracingContext

    def use(self, call: Callable[[fx.GraphModule, list[Any]], Any]) -> Any:
        """`call` as Dynamo would call a backend; as often as one likes, for rewriting leaves the graph as it is."""
        with torch._guards.tracing(self.context):
            return call(self.graph_module, self.inputs)


def dynamo_graph(model: Callable[..., Any], *args: Any, **kwargs: Any) -> DynamoGraph:
    """The graph of this call; nothing is run."""

    return while_captured(model, lambda gm, inputs: DynamoGraph(gm, inputs, TracingContext.get()), *args, **kwargs)


def captured(model: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[fx.GraphModule, list[Any]]:
    """The captured graph and the real inputs it takes."""
    return while_captured(model, lambda gm, inputs: (capture(gm, inputs), inputs), *args, **kwargs)


def a_context(num_ranks: int = 2, rank: int = 0, **options: Any) -> Context:
    """A request for Ulysses on ranks that are only pretended."""
    options.setdefault("strategy", Ulysses())
    return Context(mesh=Mesh.pretended(num_ranks, rank), rules=DEFAULT_RULES, **options)


def after(
    passes: Sequence[Pass] | type[Pass], model: Callable[..., Any], *args: Any, context: Context | None = None
) -> tuple[fx.GraphModule, Context]:
    """The model's graph after `passes`; of a pass type, after the pipeline up to and with that pass."""
    context = context if context is not None else a_context()
    if isinstance(passes, type):
        kinds = [type(step) for step in PIPELINE]
        passes = tuple(PIPELINE)[: kinds.index(passes) + 1]
    gm, _ = captured(model, *args)
    return run_passes(gm, passes, context), context


def nodes_of(gm: fx.GraphModule, target: Any) -> list[fx.Node]:
    """The nodes that call `target`, in order."""
    return [node for node in gm.graph.nodes if node.target == target]


@dataclass(frozen=True)
class Run:
    """What a run returned, and the gradient of every parameter and every input that asks for one, in order."""

    outputs: Tensors
    grads: Tensors


def run_once(call: Callable[..., Any], inputs: Sequence[Any], grad_enabled: bool = True) -> Run:
    """Call on copies of `inputs`; backward of the sum of the first output if it needs gradients."""
    own = copied(inputs)
    with torch.set_grad_enabled(grad_enabled):
        outputs = call(*own)
    outputs = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
    if outputs[0].requires_grad:
        with torch.enable_grad():
            outputs[0].sum().backward()
    grads = [x.grad for x in own if isinstance(x, torch.Tensor)]
    return Run([x.detach() if isinstance(x, torch.Tensor) else None for x in outputs], grads)


def on_ranks(
    model: Callable[..., Any], *args: Any, num_ranks: int, backend: str = "eager", **options: Any
) -> tuple[Run, list[Run], list[fx.GraphModule]]:
    """One device (Dynamo's graph, eager) and every rank, on the same inputs; and all ranks' graphs.

    All are called in the caller's grad mode.
    """

    def use(gm: fx.GraphModule, inputs: list[Any]) -> tuple[Any, ...]:
        graphs, calls = [], []
        for rank in range(num_ranks):
            rewritten = run_passes(capture(gm, inputs), PIPELINE, a_context(num_ranks, rank, **options))
            graphs.append(rewritten)
            calls.append(rewritten if backend == "eager" else _compiled(rewritten, inputs, backend, rank))
        return gm, inputs, graphs, calls

    gm, inputs, graphs, calls = while_captured(model, use, *args)
    enabled = torch.is_grad_enabled()  # of this thread
    ranks = in_lockstep(num_ranks, lambda rank: run_once(calls[rank], inputs, enabled))
    return run_once(gm, inputs, enabled), ranks, graphs


def _compiled(gm: fx.GraphModule, inputs: list[Any], backend: str, rank: int) -> Callable[..., Any]:
    with pretend(PRETENDED_GROUP, rank):
        return lookup_backend(backend)(gm, inputs)


def assert_ranks_equal_one_device(reference: Run, ranks: Sequence[Run], tolerance: float = 1e-12) -> None:
    """Outputs and gradients of every rank are those of one device."""
    for rank, run in enumerate(ranks):
        for what in ("outputs", "grads"):
            for index, (x, y) in enumerate(zip(getattr(reference, what), getattr(run, what), strict=True)):
                name = f"rank {rank}, {what} {index}"
                assert (x is None) == (y is None), f"{name}: one device {x}, got {y}"
                if x is not None:
                    scale = max(float(x.detach().double().abs().max()) if x.numel() else 0.0, 1.0)
                    torch.testing.assert_close(
                        y, x, rtol=0.0, atol=tolerance * scale, msg=lambda text, name=name: f"{name}: {text}"
                    )
