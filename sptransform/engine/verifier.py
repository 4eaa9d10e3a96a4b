"""The SPMD type-checker: invariants of a graph at each stage. Always runs after every pass. Op-agnostic.

If every edge has the placement its consumer demands, gradients are correct: each placement types value and gradient
together, and each redistribute has its transpose (see :mod:`sptransform.sharding.placement`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from sptransform.diagnostics.errors import VerificationError, describe
from sptransform.engine.context import Context
from sptransform.graph import dataflow, notes
from sptransform.graph.edit import fresh_value
from sptransform.graph.redistribute import is_redistribute
from sptransform.sharding.placement import TRANSITIONS, I, Placement, Shard, keeps_own, kind, needs_full_tensor

_EMIT = "sptransform.graph.edit.emit_like"


def satisfies(actual: Placement | None, demanded: Placement, differentiable: bool) -> bool:
    """Whether a tensor placed as ``actual`` may be read as ``demanded``. Without gradients I and R are the same."""
    if actual == demanded:
        return True
    return not differentiable and {kind(demanded), kind(actual) if actual else ""} == {"I", "R"}


def check_well_formed(graph: fx.Graph) -> None:
    """Nodes are read after they are made, call ops, and have the fake values and notes that passes read."""
    try:
        graph.lint()
    except RuntimeError as error:
        raise VerificationError(f"the graph is not well formed: {error}") from error
    owners: dict[int, fx.Node] = {}
    for node in graph.nodes:
        if not dataflow.handles_tensors(node) and dataflow.projection(node) is None:
            if node.op in ("call_method", "call_module"):
                raise VerificationError(describe("a node calls no op", node=node, found=node.op, fix=_EMIT))
            continue
        if not (dataflow.is_op(node.target) or dataflow.projection(node) is not None or is_redistribute(node)):
            raise VerificationError(
                describe("a node calls no op", node=node, found=repr(node.target), fix=f"{_EMIT} of an overload")
            )
        if dataflow.returns_tensors(node) and "val" not in node.meta:
            raise VerificationError(describe("a node has no fake value", node=node, fix=_EMIT))
        if dataflow.values(node) and notes.note(node).differentiable is None:
            # it would count as one without gradients, for which I and R are the same
            raise VerificationError(describe("nothing says whether a node is differentiable", node=node, fix=_EMIT))
        other = owners.setdefault(id(notes.note(node)), node)
        if other is not node:
            found = f"the meta of %{other.name}"
            raise VerificationError(describe("two nodes share one note", node=node, found=found, fix=_EMIT))


def check_changed(graph: fx.Graph, before: Mapping[fx.Node, tuple[Any, ...]]) -> None:
    """Changed nodes have the shapes and dtypes that their ops give. ``before``: old nodes -> op and arguments."""
    for node in graph.nodes:
        if before.get(node) == (node.target, node.args, dict(node.kwargs)):
            continue
        if node.op == "output" and len(pytree.tree_leaves(node.args)) != len(pytree.tree_leaves(before[node][1])):
            raise VerificationError(describe("the graph returns another number of results", node=node))
        if not dataflow.returns_tensors(node) or str(node.target).startswith("sptransform."):
            continue  # ours may read the rank
        stated = [(tuple(x.shape), x.dtype) for x in dataflow.values(node)]
        try:
            found = [(tuple(x.shape), x.dtype) for x in dataflow.values_of(fresh_value(node))]
        except Exception as error:
            what = f"an op does not run on its operands: {type(error).__name__}: {error}"
            raise VerificationError(describe(what, node=node)) from error
        if found != stated:
            raise VerificationError(
                describe("a fake value is not what the op gives", node=node, found=f"{stated}, {found}", fix=_EMIT)
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
            fix = "add nodes where there are no placements yet: at the end of normalize, or before"
            raise VerificationError(describe("a tensor has no placement", node=node, fix=fix))
        if note.decision is None and node.op == "call_function" and not note.transitions and note.mesh is None:
            raise VerificationError(
                describe("a placement is not what a decision gives", node=node, found=f"{note.placements}, no decision")
            )
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
        if isinstance(actual, Shard) and not context.returns_whole:
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
            describe(
                "a shard is not what its placement says",
                node=node,
                found=f"{found}, stated {stated}",
                fix="a rule whose factors are those of the op; for arguments that hold sizes, OpEntry(rule, localize)",
            )
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
