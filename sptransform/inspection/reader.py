"""Read an Explanation off a rewritten graph, from the notes of the passes."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from torch import fx

from sptransform.compiler.rewrite import Rewritten
from sptransform.diagnostics import provenance
from sptransform.engine.strategy import Strategy
from sptransform.engine.traffic import Sending, global_shape, in_order, sending_by_node
from sptransform.graph import dataflow, notes
from sptransform.graph.edit import fake_arguments
from sptransform.graph.printer import op_name, tensor_type
from sptransform.inspection.attended_work import Documents
from sptransform.inspection.explanation import Explanation
from sptransform.inspection.records import ChunkedLoss, Gathered, Output, Redistribution, RingPass
from sptransform.inspection.work_of_ranks import work_of_ranks
from sptransform.op_rules.loss import LINEAR_CROSS_ENTROPY
from sptransform.ops.ring.conditions import is_decided
from sptransform.ops.ring.kernels.table import kernel_name
from sptransform.sharding.placement import Shard


def explanation_of(rewritten: Rewritten, documents: Documents | None = None) -> Explanation:
    """What the rewritten graph inserts, where, and the bytes it sends; what :func:`explain` returns."""
    context, graph = rewritten.context, rewritten.graph_module.graph
    sent = sending_by_node(graph, context.mesh)
    rings = [node for node in sent if not notes.note(node).transitions and notes.note(node).rule.roles]
    moves = {node: sending for node, sending in sent.items() if node not in rings}
    changed = [node for node in moves if notes.note(node).transitions]
    return Explanation(
        strategy=str(context.strategy),
        world_size=context.mesh.size,
        rank=context.mesh.rank,
        redistributions=tuple(_redistribution(node, sending) for node, sending in moves.items()),
        rings=tuple(_ring(node, sent[node]) for node in rings),
        collectives=tuple(in_order(sent.values())),
        fallbacks=tuple(context.result.fallbacks),
        gathered=tuple(_gathered(changed, {fallback.node for fallback in context.result.fallbacks}, context.strategy)),
        outputs=tuple(_outputs(graph)),
        grad_sync=context.grad_sync,
        rewritten=rewritten,
        attention=tuple(work_of_ranks(rewritten, documents)),
        documents=documents,
        reason=context.strategy.reason,
        losses=tuple(map(_chunked_loss, graph.find_nodes(op="call_function", target=LINEAR_CROSS_ENTROPY))),
    )


def _chunked_loss(node: fx.Node) -> ChunkedLoss:
    _, weight, labels, *_ = dataflow.operands(node)
    tokens, classes = prod(dataflow.shape(labels)), dataflow.shape(weight)[0]
    chunk, itemsize = node.kwargs["chunk"], dataflow.values(node)[0].element_size()
    return ChunkedLoss(
        node=node.name,
        layer=provenance.module_path(node),
        source_line=provenance.source_line(node),
        tokens=str(tokens),
        classes=str(classes),
        chunk=chunk,
        chunk_bytes=chunk * classes * itemsize if isinstance(classes, int) else None,
    )


def _redistribution(node: fx.Node, sending: Sending) -> Redistribution:
    """An op that communicates itself changes no placement: it is shown with equal ends."""
    note = notes.note(node)
    transitions = note.transitions or tuple((placement, placement) for placement in note.placements)
    sources = dataflow.operands(node)
    parameters = ()
    if all(change == ("I", "R") for change in _printed(transitions)) and all(s.op == "placeholder" for s in sources):
        parameters = tuple(notes.note(source).input_name or source.name for source in sources)
    return Redistribution(
        node=node.name,
        # a bucket has the module and line of one parameter's reader, which do not fit the others
        layer="" if parameters else provenance.module_path(node),
        source_line=None if parameters else provenance.source_line(node),
        changes=_printed(transitions),
        forward=sending.forward,
        backward=sending.backward,
        again=sending.again,
        parameters=parameters,
    )


def _ring(node: fx.Node, sending: Sending) -> RingPass:
    query, _, value, *_ = map(dataflow.value, dataflow.operands(node))
    return RingPass(
        node=node.name,
        layer=provenance.module_path(node),
        source_line=provenance.source_line(node),
        kernel=kernel_name(
            query,
            value,
            masked=(masked := _computes_masks(node)),
            varying=bool(node.kwargs.get("mask")) and not masked,
            explicit=node.kwargs.get("dropout_p", 0.0) > 0 or node.kwargs.get("explicit", False),
            softcap=node.kwargs.get("softcap", 0.0),
        ),
        forward=sending.forward,
        backward=sending.backward,
    )


def _computes_masks(node: fx.Node) -> bool:
    args, kwargs = fake_arguments(node)
    program, explicit = kwargs.get("mask"), kwargs.get("explicit", False)
    tables = args[6] if len(args) > 6 else None
    return bool(program) and (explicit or not is_decided(program, args[3], args[4], tables or []))


def _printed(transitions: tuple[tuple[object, object], ...]) -> tuple[tuple[str, str], ...]:
    return tuple((str(source), str(target)) for source, target in transitions)


def _gathered(redistributions: list[fx.Node], fallbacks: set[str], strategy: Strategy) -> Iterator[Gathered]:
    """Gathers that an op with a rule asks for: one entry per reader.

    Excludes inputs, parameters, and what the strategy plans to gather.
    """
    for node in redistributions:
        moved = zip(notes.note(node).transitions, dataflow.operands(node), strict=True)
        for index, ((source, target), producer) in enumerate(moved):
            if not isinstance(source, Shard) or isinstance(target, Shard) or producer.op == "placeholder":
                continue
            value = dataflow.value(producer)
            num_bytes = value.element_size() * prod(global_shape(source, tuple(value.shape)))
            for reader in _readers(node, index):
                rule = notes.note(reader).rule
                wanted = rule is not None and strategy.gathers_for(rule)
                if reader.op != "output" and reader.name not in fallbacks and not wanted:
                    line = provenance.source_line(reader)
                    yield Gathered(op_name(reader.target), reader.name, line, num_bytes)


def _readers(node: fx.Node, index: int) -> Iterator[fx.Node]:
    """Readers of the node's output ``index``; if it has one output, its users."""
    for user in node.users:
        picked = dataflow.projection(user)
        if picked is None:
            yield user
        elif picked[1] == index:
            yield from user.users


def _outputs(graph: fx.Graph) -> Iterator[Output]:
    (output,) = (node for node in graph.nodes if node.op == "output")
    for producer in dataflow.operands(output):
        placement = notes.placement(producer)
        kind = tensor_type(dataflow.value(producer), *notes.placement_by_dim(producer), is_local=True)
        yield Output(producer.name, "whole" if placement is None else str(placement), kind)
