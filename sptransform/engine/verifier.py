"""The SPMD type-checker: invariants of a graph at each stage. Always runs after every pass. Op-agnostic.

If every edge has the placement its consumer demands, gradients are correct: each placement types value and gradient
together, and each redistribute has its transpose (see :mod:`sptransform.sharding.placement`).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from sptransform.diagnostics.errors import VerificationError, describe
from sptransform.engine.context import Context
from sptransform.graph import dataflow, notes
from sptransform.graph.redistribute import is_redistribute
from sptransform.sharding.placement import TRANSITIONS, I, Placement, Shard, keeps_own, kind, needs_full_tensor


def satisfies(actual: Placement | None, demanded: Placement, differentiable: bool) -> bool:
    """Whether a tensor placed as ``actual`` may be read as ``demanded``. Without gradients I and R are the same."""
    if actual == demanded:
        return True
    return not differentiable and {kind(demanded), kind(actual) if actual else ""} == {"I", "R"}


def check_well_formed(graph: fx.Graph) -> None:
    """Nodes are read after they are made, and each has the fake value and the note that passes read.

    Without its note a node would count as one without gradients, and I and R as the same.
    """
    try:
        graph.lint()
    except RuntimeError as error:
        raise VerificationError(f"the graph is not well formed: {error}") from error
    owners: dict[int, fx.Node] = {}
    for node in graph.nodes:
        if not dataflow.returns_tensors(node):
            continue
        if "val" not in node.meta or not notes.has_note(node):
            raise VerificationError(
                describe("a node has no fake value, or no note", node=node, fix="sptransform.graph.edit.emit_like")
            )
        other = owners.setdefault(id(notes.note(node)), node)
        if other is not node:
            raise VerificationError(
                describe(
                    "two nodes share one note",
                    node=node,
                    found=f"the meta of %{other.name}",
                    fix="sptransform.graph.edit.emit_like",
                )
            )


def check_functional(graph: fx.Graph, context: Context) -> None:
    """No op writes into a tensor, except for write-backs into placeholders (buffers)."""
    for node in graph.nodes:
        if dataflow.writes(node):
            target = node.args[0]
            if not (isinstance(target, fx.Node) and target.op == "placeholder"):
                raise VerificationError(describe("an op writes into a tensor of the graph", node=node))


def check_placed(graph: fx.Graph, context: Context) -> None:
    """Every tensor has a placement, which is the one its node's decision gives."""
    for node in graph.nodes:
        tensors = dataflow.values(node)
        if node.op == "output" or not tensors or dataflow.projection(node) is not None:
            continue
        note = notes.note(node)
        if note.placements is None or len(note.placements) != len(tensors):
            raise VerificationError(describe("a tensor has no placement", node=node))
        if note.decision is not None:
            _check_decision(node)
            given = note.decision.outcomes(note.rule, len(tensors))
            if given != note.placements:
                raise VerificationError(
                    describe(
                        "a placement is not what the decision gives", node=node, found=f"{note.placements}, {given}"
                    )
                )
        for shape, placement in zip(dataflow.shapes(node), note.placements, strict=True):
            if isinstance(placement, Shard) and shape[placement.dim] != placement.dim_size:
                raise VerificationError(
                    describe("a shard does not fit its tensor", node=node, found=f"{placement.spec}, {shape}")
                )
            if isinstance(placement, Shard) and not placement.partition.is_covering:
                raise VerificationError(describe("a part of a tensor has no owner", node=node, found=placement.spec))


def _check_decision(node: fx.Node) -> None:
    """The op's rule allows its decision; without that, ranks would compute wrong values."""
    note = notes.note(node)
    if not note.decision.is_allowed(note.rule):
        raise VerificationError(describe("an op cannot run as decided", node=node, found=str(note.decision)))


def check_typed(graph: fx.Graph, context: Context) -> None:
    """Every operand has the placement its op demands; every redistribute is a transition that has a transpose."""
    for node in graph.nodes:
        note = notes.note(node)
        if is_redistribute(node):
            for producer, (source, target) in zip(dataflow.operands(node), note.transitions, strict=True):
                if notes.placement(producer) != source:
                    raise VerificationError(
                        describe(
                            "a redistribute starts from another placement than its operand has",
                            node=node,
                            found=f"{notes.placement(producer)}, stated {source}",
                        )
                    )
                if isinstance(source, Shard) and not source.partition.is_exact and not keeps_own(source, target):
                    raise VerificationError(
                        describe("a tensor of which ranks share parts cannot be moved on", node=node, found=source.spec)
                    )
                if (kind(source), kind(target)) not in TRANSITIONS:
                    raise VerificationError(
                        describe("no transition between these placements", node=node, found=f"{source} -> {target}")
                    )
                if needs_full_tensor(source, target):
                    raise VerificationError(
                        describe(
                            "shards of one dimension differ in more than who owns which index",
                            node=node,
                            found=f"{source.spec} -> {target.spec}",
                        )
                    )
        elif note.decision is not None:
            _check_operands(node)
        elif node.op == "output":
            _check_outputs(node, context)


def _check_operands(node: fx.Node) -> None:
    note = notes.note(node)
    operands = dataflow.operands(node)
    asked = note.decision.demands(note.rule, len(operands))
    for index, (producer, demanded) in enumerate(zip(operands, asked, strict=True)):
        actual = notes.placement(producer)
        if demanded is not None and not satisfies(actual, demanded, notes.note(producer).differentiable):
            raise VerificationError(
                describe(
                    f"operand {index} (%{producer.name}) is not placed as its consumer demands",
                    node=node,
                    found=f"{actual}, demanded {demanded}",
                )
            )


def _check_outputs(node: fx.Node, context: Context) -> None:
    for x in dataflow.operands(node):
        actual = notes.placement(x)
        if isinstance(actual, Shard) and context.outputs != "full":
            if not actual.is_contiguous and context.outputs != "kept":
                raise VerificationError(
                    describe("the graph returns a shard in another order than its tensor", node=x, found=actual.spec)
                )
        elif not satisfies(actual, I, notes.note(x).differentiable):
            raise VerificationError(describe("the graph returns a tensor that is not whole", node=x, found=str(actual)))


def check_local(graph: fx.Graph, context: Context) -> None:
    """On fake shards, every node gives the local shape and dtype that its placement and the global graph imply."""
    for node in graph.nodes:
        check_local_types(node)


def check_local_types(node: fx.Node) -> None:
    stated = notes.note(node).local_types
    found = tuple(zip(dataflow.shapes(node), (v.dtype for v in dataflow.values(node)), strict=True))
    if stated is not None and found != stated:
        raise VerificationError(
            describe("a shard is not what its placement says", node=node, found=f"{found}, stated {stated}")
        )


def check_lowered(graph: fx.Graph, context: Context) -> None:
    """No redistribute is left."""
    for node in graph.nodes:
        if is_redistribute(node):
            raise VerificationError(describe("a redistribute was not lowered", node=node))


INVARIANTS: dict[str, Callable[[fx.Graph, Context], None]] = {
    "functional": check_functional,
    "placed": check_placed,
    "typed": check_typed,
    "local": check_local,
    "lowered": check_lowered,
}
