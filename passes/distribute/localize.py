"""Let every op run on shards: sizes in its arguments become local, and fake values are those of this rank.

Before: ``%v : f32[2,64,8,8] = aten.view(%x, [2, 64, 8, 8])`` with dim 1 cut over 4 ranks; after:
``%v : f32[2,16@sp,8,8] = aten.reshape(%x, [2, 16, 8, 8])``.

1. Ops whose table entry has a ``localize`` function are rewritten by it where they are sharded.
2. A sharded parameter or input becomes an input of the local shape.
3. The body of a custom autograd.Function is made local as this graph is.
4. Every node is then run on fake shards; the verifier compares shape and dtype with what its placement says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import fx

from sptransform.diagnostics.errors import RuleError, describe
from sptransform.engine import verifier
from sptransform.engine.bodies import body_with_rules, has_body, runs_on_shards
from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow, notes
from sptransform.graph.body_graphs import name_of, set_body
from sptransform.graph.calls import op_call, rule_at
from sptransform.graph.edit import compute_value, emitter, succeed
from sptransform.graph.redistribute import keep_result
from sptransform.ops.groups import pretend
from sptransform.rules.rule import OpCall
from sptransform.rules.table import Local, Sends
from sptransform.sharding.placement import Placement, Shard, local_shape
from sptransform.sharding.sizes import needs_number


@dataclass(frozen=True)
class Localize(Pass):
    requires = frozenset({"typed", "lowered"})
    ensures = frozenset({"functional", "lowered", "local"})
    breaks = frozenset({"placed", "typed"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        nodes = list(graph.nodes)
        for node in nodes:
            if has_body(node) and notes.note(node).decision.is_cut:
                self._localize_body(node, context)
        calls = {node: op_call(node) for node in nodes if _has_local_form(node, context)}
        for node in nodes:
            note = notes.note(node)
            if note.placements is not None:
                pairs = zip(note.placements, dataflow.shapes(node), dataflow.values(node), strict=True)
                note.local_types = tuple(
                    (local_shape(placement, shape, context.mesh.rank), value.dtype) for placement, shape, value in pairs
                )
        with _fakes(graph), ranks_of(graph, context):
            for node in nodes:
                if node in calls:
                    _localize(node, calls[node], context)
                elif node.op == "call_function":
                    _compute(node)
                    verifier.check_local_types(node)
                elif notes.note(node).stored:
                    ((shape, _),) = notes.note(node).local_types
                    node.meta["val"] = dataflow.value(node).new_empty(shape)

    def _localize_body(self, node: fx.Node, context: Context) -> None:
        """Write the body that ``node`` runs on shards. What can be cut by a user's rule alone stays as it is."""
        note = notes.note(node)
        body = body_with_rules(node, context.rules)
        if not runs_on_shards(body, note.rule, note.decision):
            assert rule_at(node, context.rules) is not None, f"{name_of(node)} does not run as its rule says"
            return
        for x in (*body.operands, *body.given):
            if isinstance(placement := notes.placement(x), Shard):
                notes.note(x).stored = (notes.Stored(placement.dim, context.mesh.group),)
        self.run(body.graph, context)
        set_body(node, str(body.body))


def _compute(node: fx.Node) -> None:
    try:
        compute_value(node)
    except Exception as error:
        if needs_number(error) or not notes.note(node).rule or not notes.note(node).decision.is_cut:
            raise
        raise RuleError(
            describe(
                f"an op does not run on shards: {type(error).__name__}: {error}",
                node=node,
                found=f"operands of shape {', '.join(map(str, map(dataflow.shape, dataflow.operands(node))))}",
                fix="OpEntry(rule, localize) for arguments that hold sizes, or a rule with fewer factors to cut",
            )
        ) from error


def _has_local_form(node: fx.Node, context: Context) -> bool:
    decision = notes.note(node).decision
    if node.op != "call_function" or decision is None or not decision.is_cut:
        return False
    entry = context.rules.get(node.target)
    has_form = entry is not None and entry.localize is not None
    if not has_form and decision.communicates(notes.note(node).rule):
        raise RuleError(_message("an op that communicates needs a form for shards", node, "localize"))
    return has_form


def _localize(node: fx.Node, call: OpCall, context: Context) -> None:
    note = notes.note(node)
    local = Local(
        emit=emitter(node),
        operands=tuple(dataflow.operands(node)),
        operand_shapes=tuple(map(dataflow.shape, dataflow.operands(node))),
        result_shapes=tuple(shape for shape, _ in note.local_types),
        result_dtypes=tuple(dtype for _, dtype in note.local_types),
        rule=note.rule,
        decision=note.decision,
        rank=context.mesh.rank,
        group=context.mesh.group,
    )
    new = context.rules[node.target].localize(call, local)
    if _is_of_results(new, node, call):
        _give_each(node, new)
        return
    if not isinstance(new, fx.Node):
        fix = "return local.run(call, ..), or what local.emit(..) returned"
        found = f"{type(new).__name__} from its form for shards"
        raise RuleError(describe(f"{node.target} has no result on a shard", node=node, found=found, fix=fix))
    if new in local.operands:  # the note of an operand stays its own
        new = local.emit(torch.ops.aten.alias.default, (new,), {})
    notes.copy_note(node, new)
    notes.note(new).transitions = _held(note, local.operands, context.mesh.rank)
    communicates = note.decision.communicates(note.rule)
    if communicates:
        notes.note(new).mesh, notes.note(new).sends = context.mesh, _sends(new, context)
    if communicates or note.rule.unrepeatable:
        keep_result(new)
    verifier.check_local_types(new)
    succeed(node, new)


def _is_of_results(new: object, node: fx.Node, call: OpCall) -> bool:
    """Whether a form for shards returned a node for each of the results of ``node``."""
    if not isinstance(new, list) or len(new) != len(call.result_shapes):
        return False
    is_taken = all(dataflow.projection(user) is not None for user in node.users)
    return is_taken and all(isinstance(each, fx.Node) for each in new)


def _give_each(node: fx.Node, results: list[fx.Node]) -> None:
    """Replace ``node`` by a node for each of its results. Who takes one keeps its note, and is checked in its turn."""
    for user in list(node.users):
        _, index = dataflow.projection(user)
        user.target, user.args = torch.ops.aten.alias.default, (results[index],)
    node.graph.erase_node(node)


def _sends(node: fx.Node, context: Context) -> Sends:
    entry = context.rules.get(node.target)
    if entry is None or entry.sends is None:
        raise RuleError(_message("an op that communicates says what it sends", node, "sends"))
    return entry.sends


def _message(what: str, node: fx.Node, missing: str) -> str:
    fix = f"rules={{torch.ops.{node.target}: sptransform.OpEntry(.., {missing}=..)}}"
    return describe(what, node=node, found=f"no `{missing}` in its rule", fix=fix)


def _held(
    note: notes.Note, operands: tuple[fx.Node, ...], rank: int
) -> tuple[tuple[Placement, Placement], ...]:
    """Transitions of an outer mesh dim, in this rank's local sizes.

    A gather has the outer dim's full tensor as its result, a cut as its operand. The placement of that tensor on this
    mesh dim says which indices this rank holds.
    """
    if not note.transitions:
        return ()
    found = []
    for (source, target), operand, result in zip(note.transitions, operands, note.placements, strict=True):
        ends = (source, result), (target, notes.placement(operand))
        found.append(tuple(end.held(held, rank) if isinstance(end, Shard) else end for end, held in ends))
    return tuple(found)


@contextmanager
def ranks_of(graph: fx.Graph, context: Context) -> Iterator[None]:
    """Let ops query this rank, on this mesh dim and on those distributed before it."""
    meshes = {note.mesh for note in map(notes.note, graph.nodes) if note.mesh is not None} | {context.mesh}
    with ExitStack() as stack:
        for mesh in meshes:
            stack.enter_context(pretend(mesh.group, mesh.rank))
        yield


@contextmanager
def _fakes(graph: fx.Graph) -> Iterator[None]:
    """Run ops on fake tensors, without gradients; restore grad mode, which grad-mode nodes may have changed."""
    mode = dataflow.fake_mode(graph)
    before = torch.is_grad_enabled()
    try:
        with mode, torch.no_grad():
            yield
    finally:
        torch._C._set_grad_enabled(before)
