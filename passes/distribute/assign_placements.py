"""Give every node its rule, a decision, and every tensor a placement.

1. Rules are looked up and applied to global shapes, and derived for custom autograd.Functions; axes are inferred from
   them. Where neither attention nor an input says what is a sequence, weaker evidence does (see
   :mod:`sptransform.engine.sequences`). Along cumulative sums and scans ranks get blocks in order.
2. Placeholders and constants are I; with ``grad_sync=False`` trainable ones are R, and their gradients stay pending.
   Sharded parameters and inputs are S.
3. Where weights are cut, inner axes are found (see :mod:`sptransform.engine.inner_axes`).
4. Propagation decides (see :mod:`sptransform.engine.propagation`).
5. With ``shard_parameters``, this pass decides along which dim each parameter is stored.
6. An op without a rule is recorded if it gathers a shard or works on trainable tensors; with ``strict`` it is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from sptransform.diagnostics import provenance
from sptransform.diagnostics.errors import UnsupportedOpError, UsageError, describe
from sptransform.engine.axes import Axes
from sptransform.engine.bodies import has_body, rule_of_body
from sptransform.engine.context import Context, Fallback
from sptransform.engine.pass_manager import Pass
from sptransform.engine.propagation import Propagation, light_nodes
from sptransform.engine.sequences import ordered_factors, strongest_evidence
from sptransform.graph import dataflow, notes
from sptransform.graph.body_graphs import name_of
from sptransform.graph.calls import rule_at
from sptransform.op_rules.mask_ops import SOFTMAX
from sptransform.sharding.partition import Partition
from sptransform.sharding.placement import I, Placement, R, Shard


@dataclass(frozen=True)
class AssignPlacements(Pass):
    requires = frozenset({"functional"})
    ensures = frozenset({"functional", "placed"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        for node in graph.nodes:
            if dataflow.handles_tensors(node):
                rule = rule_at(node, context.rules)
                is_derived = rule is None and has_body(node)
                notes.note(node).rule = rule_of_body(node, context.rules) if is_derived else rule
        light = light_nodes(graph)
        rules = [note.rule for note in map(notes.note, graph.nodes) if note.rule is not None]
        context.result.is_causal = any(rule.is_causal for rule in rules)
        axes = Axes(graph, context.divide, context.sequence_dims, ignored=light)
        if not axes.has_sequence:  # without attention, sharded inputs tell the sequence dim
            axes = Axes(graph, context.divide, {**_shared_inputs(graph), **context.sequence_dims}, ignored=light)
        if not axes.has_sequence:
            axes.add_sequences(strongest_evidence(graph, light))
        ordered = ordered_factors(graph, light)
        joined = ((node, name) for node, name in ordered if name in notes.note(node).rule.self_reduced)
        context.result.is_ordered = any(axes.is_sequence(axes.factor(node, name)[0]) for node, name in joined)
        if not any(rule.roles for rule in rules) and not axes.has_sequence:
            raise UsageError(
                describe(
                    "nothing in this graph says which dimension is the sequence",
                    found="no scaled_dot_product_attention of queries [batch, heads, sequence, head size], no "
                    "convolution or scan along a dimension, and no table that is read at an input"
                    + _of_another_form(graph, context),
                    fix="pass sequence_dims={'<input name>': <dim>}; inputs of this graph: "
                    + ", ".join(_user_inputs(graph)),
                )
            )
        sources = (n for n in graph.nodes if n.op in ("placeholder", "get_attr") and dataflow.values(n))
        inputs = {n: self._input(n, context) for n in sources}
        inner = context.strategy.inner_axes(graph, axes, context.mesh.size, light)
        is_only_dim = context.num_ranks <= context.mesh.size
        propagation = Propagation(graph, context.strategy, context.mesh.size, inputs, axes, light, inner, is_only_dim)
        propagation.run()
        if context.shard_parameters:
            for node in inputs:
                note = notes.note(node)
                if note.is_parameter and all(stored.group != context.mesh.group for stored in note.stored):
                    self._keep_part(node, propagation.demanded(node), context)
        for node in graph.nodes:
            if node.op == "call_function" and notes.note(node).decision is not None:
                self._record_fallback(node, context)

    def _input(self, node: fx.Node, context: Context) -> Placement:
        for stored in notes.note(node).stored:
            if stored.group == context.mesh.group:
                size = dataflow.shape(node)[stored.dim]
                return Shard(stored.dim, Partition.contiguous(size, context.mesh.size))
        return R if notes.note(node).differentiable and not context.grad_sync else I

    def _keep_part(self, node: fx.Node, demanded: list[Placement], context: Context) -> None:
        """Note along which dimension ranks keep parts of a parameter, if they do."""
        num_ranks = max(context.num_ranks, context.mesh.size)
        is_stored = bool(notes.note(node).stored)
        dim = context.strategy.stored_dim(dataflow.shape(node), demanded, num_ranks, is_stored)
        if dim is not None:
            notes.note(node).stored += (notes.Stored(dim, context.mesh.group),)
            notes.set_placement(node, self._input(node, context))

    def _record_fallback(self, node: fx.Node, context: Context) -> None:
        note = notes.note(node)
        is_unproved = has_body(node) and note.decision.is_replicated and rule_at(node, context.rules) is None
        if not (note.rule is None or is_unproved) or any(known.node == node.name for known in context.result.fallbacks):
            return
        gathered = [
            producer
            for producer in dataflow.operands(node)
            if isinstance(notes.placement(producer), Shard)
        ]
        # positions and masks are replicated anyway; work on trainable tensors should not be
        if not gathered and (note.rule is not None or not note.differentiable):
            return
        op = f"autograd.Function {name_of(node)}" if has_body(node) else str(node.target)
        if context.strict:
            key = name_of(node) if has_body(node) else f"torch.ops.{node.target}"
            raise UnsupportedOpError(
                describe(
                    f"{op} has no sharding rule, and strict=True forbids running it replicated",
                    node=node,
                    found=", ".join(f"%{x.name} placed {notes.placement(x)}" for x in dataflow.operands(node)),
                    fix=f"strict=False to gather its operands, or a rule for it: rules={{{key}: sptransform.rule(..)}}",
                )
            )
        num_bytes = sum(dataflow.value(x).numel() * dataflow.value(x).element_size() for x in gathered)
        context.result.fallbacks.append(Fallback(op, node.name, provenance.source_line(node), num_bytes))


def _of_another_form(graph: fx.Graph, context: Context) -> str:
    """The first softmax, which is not read as attention; or the first op that has a rule for other calls only."""
    softmax = next((node for node in graph.nodes if node.target in SOFTMAX), None)
    if softmax is not None:
        return f"; %{softmax.name} = {softmax.target} is not between two products in a way that is read as attention"
    known = (node for node in graph.nodes if dataflow.handles_tensors(node) and node.target in context.rules)
    unruled = next((node for node in known if notes.note(node).rule is None), None)
    return "" if unruled is None else f"; %{unruled.name} = {unruled.target} is of a form that has no rule"


def _shared_inputs(graph: fx.Graph) -> dict[str, int]:
    """Name -> sharded dimension, of inputs that arrive sharded."""
    found = [notes.note(node) for node in graph.find_nodes(op="placeholder")]
    return {note.input_name: note.stored[0].dim for note in found if note.stored and not note.is_parameter}


def _user_inputs(graph: fx.Graph) -> list[str]:
    """Names of the tensors the user passes: inputs that are not the module's own."""
    names = [notes.note(n).input_name for n in graph.nodes if n.op == "placeholder" and dataflow.is_tensor(n)]
    return [name for name in names if name is not None and "." not in name] or ["(none)"]
