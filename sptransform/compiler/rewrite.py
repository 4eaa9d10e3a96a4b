"""``rewrite``: what parallelize would compile, as a graph to read. Needs no processes and runs no model."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import fx, nn

from sptransform.capture.capture import capture
from sptransform.capture.lengths import fix_sizes, has_symbolic_sizes
from sptransform.capture.torch_versions import devices_as_written
from sptransform.compiler.checks import check_sequence_dims
from sptransform.compiler.compile_log import traced
from sptransform.compiler.distribute import distribute
from sptransform.compiler.dynamo import configured
from sptransform.compiler.fake_models import faked, without_meta
from sptransform.compiler.options import Options
from sptransform.compiler.trials import Capture, trials
from sptransform.diagnostics import provenance
from sptransform.diagnostics.errors import SPTransformError
from sptransform.diagnostics.said_once import each_sentence_once
from sptransform.engine.context import Context
from sptransform.engine.strategy import Strategy
from sptransform.graph.listing import Line, listing
from sptransform.graph.printer import line, text
from sptransform.sharding.mesh import Mesh
from sptransform.sharding.sizes import needs_number
from sptransform.strategies.names import StrategyLike

log = logging.getLogger(__name__)
T = TypeVar("T")


def rewrite_graph(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    options: Options,
    mesh: Mesh,
    see: Callable[[fx.Graph, Context | None], None] = lambda graph, part: None,
    full_model: bool = True,
    shard_parameters: bool = False,
    apart: Collection[str] = (),
    capturing: Capture = capture,
) -> tuple[fx.GraphModule, Context]:
    """Capture ``gm`` and run the pipeline on it; returns the rewritten graph and what the passes found.

    Lengths that Dynamo left symbolic stay symbolic if every rank always gets an equal share; if something needs the
    number itself, they are fixed. ``see`` is called with the captured graph before it changes, then after each mesh
    dim with that dim's context; ``full_model``: ``gm`` is the whole model; ``shard_parameters``: see :class:`Context`;
    ``apart``: see :meth:`Pipeline.keeping_apart`; ``capturing`` makes the captured graph, which is rewritten in place.
    """
    try:
        with no_garbage_collection():
            fix_sizes(gm, options.strategy.multiple(mesh.size) or 1)
            return _rewrite_graph(gm, inputs, options, mesh, see, full_model, shard_parameters, apart, capturing)
    except Exception as error:
        if not (needs_number(error) and has_symbolic_sizes(gm)):
            raise
        log.info("compiling for one length: %s", error)
        fix_sizes(gm, None)
        return _rewrite_graph(gm, inputs, options, mesh, see, full_model, shard_parameters, apart, capturing)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Pause garbage collection: scanning the graphs, which stay alive anyway, takes a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _rewrite_graph(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    options: Options,
    mesh: Mesh,
    see: Callable[[fx.Graph, Context | None], None],
    full_model: bool,
    shard_parameters: bool,
    apart: Collection[str],
    capturing: Capture,
) -> tuple[fx.GraphModule, Context]:
    context = Context(
        mesh=mesh,
        strategy=options.strategy,
        rules=options.rule_table,
        outputs=options.outputs,
        grad_sync=options.grad_sync,
        strict=options.strict,
        shard_parameters=shard_parameters,
        sequence_dims=options.sequence_dims,
        loss_chunk=options.loss_chunk,
    )
    with devices_as_written(), each_sentence_once():
        captured = capturing(gm, inputs)
        check_sequence_dims(captured.graph, options.sequence_dims, full_model)
        see(captured.graph, None)
        with traced(captured.graph, context):
            distribute(captured, context, options.pipeline.keeping_apart(apart) if apart else options.pipeline, see)
    for fallback in context.result.fallbacks:
        log.warning(
            "%s has no sharding rule and runs replicated (%d bytes gathered) at %s",
            fallback.op,
            fallback.gathered_bytes,
            fallback.source,
        )
    return captured, context


@dataclass(frozen=True)
class Rewritten:
    """One rank's rewritten graph.

    Attributes:
        graph_module: runnable where the process group exists.
        context: the request and what the passes found (``fallbacks``, ``output_placements``).
        before: the captured graph, before any pass.
    """

    graph_module: fx.GraphModule
    context: Context
    before: tuple[Line, ...] = field(default=(), repr=False, compare=False)

    def text(self, layer: str | None = None) -> str:
        """The graph, one line per node; with ``layer`` only the nodes of that module path and its submodules."""
        nodes = list(self.graph_module.graph.nodes)
        if layer:
            inside = (provenance.module_path(node) for node in nodes)
            nodes = [n for n, path in zip(nodes, inside, strict=True) if path == layer or path.startswith(f"{layer}.")]
        return text(nodes, is_local=True)

    @cached_property
    def text_by_layer(self) -> Mapping[str, tuple[str, ...]]:
        """Module path -> the module's own lines, in the order of the graph; "" is the model itself."""
        lines: dict[str, list[str]] = {}
        for node in self.graph_module.graph.nodes:
            lines.setdefault(provenance.module_path(node), []).append(line(node, is_local=True))
        return {path: tuple(own) for path, own in lines.items()}

    def __str__(self) -> str:
        return self.text()


class _Stop(SPTransformError):
    """Ends the model's call once its graph is used; raised while compiling, so that Dynamo caches nothing."""


def rewrite(
    model: nn.Module,
    strategy: StrategyLike,
    inputs: Mapping[str, Any] | tuple[Any, ...],
    *,
    world_size: int | tuple[int, ...],
    rank: int = 0,
    **options: Any,
) -> Rewritten:
    """Return the graph ``rank`` of ``world_size`` would run, without processes; the model is not run or changed.

    Args:
        model: the unmodified module.
        strategy: as for :func:`parallelize`.
        inputs: keyword arguments (a mapping) or positional ones (a tuple) of the model's forward. They and the model
            may live on the ``meta`` device, where they take no memory.
        world_size: number of ranks, or a tuple with the size of each mesh dim; for one rank, the captured graph.
        rank: the rank whose graph is returned; with even partitions all ranks have the same.
        options: further options of :func:`parallelize` (``outputs``, ``grad_sync``, ``strict``, ``sequence_dims``,
            ``rules``, ``passes``, ``loss_chunk``).

    Raises:
        UsageError: an argument is wrong.
    """
    chosen = Options.of({"outputs": "dtensor", **options, "strategy": strategy})
    mesh = chosen.strategy.pretended_mesh(world_size, rank)
    model, inputs = without_meta(model, inputs)
    return rewrite_call(model, *arguments_of(inputs), chosen, mesh)


def arguments_of(inputs: Mapping[str, Any] | tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call; users give one or the other."""
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})


def rewrite_call(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options, mesh: Mesh
) -> Rewritten:
    """The graph of one call of the model, rewritten for a pretended mesh, as if parameters were sharded.

    Ignores the mesh of ``options``. Raises UsageError as :func:`rewrite`.
    """
    return while_captured(model, lambda gm, inputs: rewritten_for(mesh, gm, inputs, options), *args, **kwargs)


def while_captured(
    model: Callable[..., Any], use: Callable[[fx.GraphModule, list[Any]], T], *args: Any, **kwargs: Any
) -> T:
    """What ``use`` makes of Dynamo's graph of one call and its inputs, while Dynamo's context is open.

    Nothing is run.
    """
    found: list[T] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        # a copy, for `use` may keep it: since torch 2.15 Dynamo empties the graph of a compile that ends with an error
        found.append(use(fx.GraphModule(gm, copy.deepcopy(gm.graph)), inputs))
        raise _Stop

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    with suppress(_Stop):
        configured(compiled)(*args, **kwargs)
    return found[0]


def settled(options: Options, mesh: Mesh, gm: fx.GraphModule, inputs: list[Any]) -> Options:
    """``options`` with the strategy that theirs chooses for Dynamo's ``gm``; if it is one that places, as they are.

    Raises:
        UsageError: no strategy can run ``gm``.
    """
    if not options.strategy.chooses or mesh.size == 1:
        return options

    def trials_of(
        graph: fx.GraphModule, given: list[Any], apart: Collection[str] = ()
    ) -> Callable[[Strategy, tuple[int, ...], int], Rewritten]:
        return trials(partial(rewritten_for, apart=apart), graph, given, options, mesh)

    chosen = options.strategy.choose(gm, inputs, trials_of, mesh, options.shard_parameters)
    return replace(options, strategy=chosen)


def settled_for_call(
    model: nn.Module, options: Options, mesh: Mesh, inputs: Mapping[str, Any] | tuple[Any, ...]
) -> Options:
    """As :func:`settled`, for the graph of a call of ``model``, which is not run; only shapes matter."""
    copied, inputs = faked(model, inputs)
    args, kwargs = arguments_of(inputs)
    return while_captured(copied, lambda gm, given: settled(options, mesh, gm, given), *args, **kwargs)


def rewritten_for(
    mesh: Mesh,
    gm: fx.GraphModule,
    example_inputs: list[Any],
    options: Options,
    capturing: Capture = capture,
    apart: Collection[str] = (),
) -> Rewritten:
    """Dynamo's ``gm``, which is called with ``example_inputs``, as :func:`rewrite_call` rewrites it.

    Parameters of the modules ``apart`` travel in messages of their own, as those of a layer must that stands for
    others. ``capturing``: see :func:`rewrite_graph`.
    """
    options = settled(options, mesh, gm, example_inputs)
    if mesh.size > 1:
        before: list[Line] = []

        def see(graph: fx.Graph, part: Context | None) -> None:
            if part is None:
                before[:] = listing(graph.nodes)  # a rewriting that starts again sees the graph again

        keeps_parts = options.keeps_parts
        made = rewrite_graph(
            gm, example_inputs, options, mesh, see, shard_parameters=keeps_parts, apart=apart, capturing=capturing
        )
        return Rewritten(*made, tuple(before))
    # one rank runs the model as it is, see compiler/backend.py
    context = Context(mesh, options.strategy, options.rule_table, options.outputs)
    with devices_as_written():
        return Rewritten(capturing(gm, example_inputs), context)
