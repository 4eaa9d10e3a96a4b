"""Read an Explanation off a rewritten graph: nothing is computed that the passes did not note."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

from torch import fx

from sptransform import annotations
from sptransform.explain.counting import Collective, collectives_by_node, global_shape
from sptransform.explain.explanation import Explanation, Gathered, Output, Redistribution
from sptransform.placement import Shard
from sptransform.printer import op_name, tensor_type

if TYPE_CHECKING:
    from sptransform.rewrite import Rewritten


def read(rewritten: Rewritten) -> Explanation:
    """The explanation of ``rewritten``."""
    context, graph = rewritten.context, rewritten.graph_module.graph
    sent = collectives_by_node(graph, context.mesh)
    return Explanation(
        strategy=str(context.strategy),
        world_size=context.mesh.size,
        rank=context.mesh.rank,
        redistributions=tuple(_redistribution(node, *pair) for node, pair in sent.items()),
        fallbacks=tuple(context.fallbacks),
        gathered=tuple(_gathered(list(sent), {fallback.node for fallback in context.fallbacks})),
        outputs=tuple(_outputs(graph)),
        grad_sync=context.grad_sync,
        rewritten=rewritten,
    )


def _redistribution(node: fx.Node, forward: Collective | None, backward: Collective | None) -> Redistribution:
    transitions = annotations.note(node).transitions
    sources = annotations.operands(node)
    parameters = ()
    if all(change == ("I", "R") for change in _printed(transitions)) and all(s.op == "placeholder" for s in sources):
        parameters = tuple(annotations.note(source).input_name or source.name for source in sources)
    return Redistribution(
        node=node.name,
        # of parameters in one bucket, only one has this reader
        layer="" if parameters else annotations.module_path(node),
        source_line=None if parameters else annotations.source_line(node),
        changes=_printed(transitions),
        forward=forward,
        backward=backward,
        parameters=parameters,
    )


def _printed(transitions: tuple[tuple[object, object], ...]) -> tuple[tuple[str, str], ...]:
    return tuple((str(source), str(target)) for source, target in transitions)


def _gathered(redistributions: list[fx.Node], fallbacks: set[str]) -> Iterator[Gathered]:
    """Gathers that an op with a rule asks for: one entry a reader."""
    for node in redistributions:
        for (source, target), producer in zip(
            annotations.note(node).transitions, annotations.operands(node), strict=True
        ):
            if not isinstance(source, Shard) or isinstance(target, Shard):
                continue
            value = annotations.value(producer)
            num_bytes = value.element_size() * prod(global_shape(source, tuple(value.shape)))
            for reader in node.users:
                if reader.op != "output" and reader.name not in fallbacks:
                    line = annotations.source_line(reader)
                    yield Gathered(op_name(reader.target), reader.name, line, num_bytes)


def _outputs(graph: fx.Graph) -> Iterator[Output]:
    (output,) = (node for node in graph.nodes if node.op == "output")
    for producer in annotations.operands(output):
        placement = annotations.placement(producer)
        kind = tensor_type(annotations.value(producer), placement, is_local=True)
        yield Output(producer.name, "whole" if placement is None else str(placement), kind)
