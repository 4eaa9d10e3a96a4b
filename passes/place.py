"""Give every node its rule, a decision, and every tensor a placement.

1. Rules are looked up and applied to global shapes; axes are inferred from them.
2. Placeholders and constants are I; with ``grad_sync=False`` trainable ones are R, and their gradients stay pending.
   Parameters and inputs of which each rank has a part are S.
3. Where weights are cut, inner axes are found (see :mod:`sptransform.inner_axes`).
4. Propagation decides (see :mod:`sptransform.propagation`).
5. With ``shard_parameters`` it is decided which part of each parameter a rank is to keep.
6. An op without a rule that gathers a shard, or works on trainable tensors, is recorded, or with ``strict`` refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from sptransform import annotations
from sptransform.axes import Axes
from sptransform.calls import op_call
from sptransform.errors import UnsupportedOpError, UsageError, describe
from sptransform.inner_axes import InnerAxes
from sptransform.parameters import first_dim
from sptransform.partition import Partition
from sptransform.pass_manager import Context, Fallback, Pass
from sptransform.placement import I, Placement, R, Shard
from sptransform.propagation import Propagation, light_nodes


@dataclass(frozen=True)
class Place(Pass):
    requires = frozenset({"functional"})
    ensures = frozenset({"functional", "placed"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        for node in graph.nodes:
            if annotations.handles_tensors(node):
                annotations.note(node).rule = context.rules.rule_of(op_call(node))
        light = light_nodes(graph)
        rules = [note.rule for note in map(annotations.note, graph.nodes) if note.rule is not None]
        context.is_causal = any(rule.is_causal for rule in rules)
        axes = Axes(graph, context.divide, context.sequence_dims, ignored=light)
        if not axes.has_sequence:  # without attention, what arrives in parts is cut along the sequence
            axes = Axes(graph, context.divide, {**_shared_inputs(graph), **context.sequence_dims}, ignored=light)
        if not any(rule.roles for rule in rules) and not axes.has_sequence:
            raise UsageError(
                describe(
                    "nothing in this graph says which dimension is the sequence",
                    found="no scaled_dot_product_attention of queries [batch, heads, sequence, head size]",
                    fix="pass sequence_dims={'<input name>': <dim>}; inputs of this graph: "
                    + ", ".join(_user_inputs(graph)),
                )
            )
        sources = (n for n in graph.nodes if n.op in ("placeholder", "get_attr") and annotations.values(n))
        inputs = {n: self._input(n, context) for n in sources}
        inner = InnerAxes(graph, axes, context.mesh.size, light) if context.strategy.shards_weights else None
        propagation = Propagation(graph, context.strategy, context.mesh.size, inputs, axes, light, inner)
        propagation.run()
        if context.shard_parameters:
            for node in inputs:
                note = annotations.note(node)
                if note.is_parameter and all(stored.group != context.mesh.group for stored in note.stored):
                    self._keep_part(node, propagation.demanded(node), context)
        for node in graph.nodes:
            if node.op == "call_function" and annotations.note(node).decision is not None:
                self._record_fallback(node, context)

    def _input(self, node: fx.Node, context: Context) -> Placement:
        for stored in annotations.note(node).stored:
            if stored.group == context.mesh.group:
                size = annotations.shape(node)[stored.dim]
                return Shard(stored.dim, Partition.contiguous(size, context.mesh.size))
        return R if annotations.note(node).differentiable and not context.grad_sync else I

    def _keep_part(self, node: fx.Node, demanded: list[Placement], context: Context) -> None:
        """Store of a parameter what the graph reads of it; where only sequences are split, of each its first dim."""
        if context.strategy.shards_weights:
            dims = {x.dim if isinstance(x, Shard) and x.partition.is_exact else None for x in demanded}
            dim = dims.pop() if len(dims) == 1 else None
        else:
            num_ranks = max(context.num_ranks, context.mesh.size)
            dim = 0 if annotations.note(node).stored else first_dim(annotations.shape(node), num_ranks)
        if dim is not None:
            annotations.note(node).stored += (annotations.Stored(dim, context.mesh.group),)
            annotations.set_placement(node, self._input(node, context))

    def _record_fallback(self, node: fx.Node, context: Context) -> None:
        note = annotations.note(node)
        if note.rule is not None or any(known.node == node.name for known in context.fallbacks):
            return
        gathered = [
            producer
            for producer in annotations.operands(node)
            if isinstance(annotations.placement(producer), Shard)
        ]
        # positions and masks are whole on every rank anyway; work on trainable tensors is not meant to be
        if not gathered and not note.differentiable:
            return
        if context.strict:
            raise UnsupportedOpError(
                describe(
                    f"{node.target} has no sharding rule, and strict=True forbids running it replicated",
                    node=node,
                    found=", ".join(f"%{x.name} placed {annotations.placement(x)}" for x in annotations.operands(node)),
                    fix="pass strict=False to gather its operands, or add a rule for it",
                )
            )
        num_bytes = sum(annotations.value(x).numel() * annotations.value(x).element_size() for x in gathered)
        context.fallbacks.append(Fallback(str(node.target), node.name, annotations.source_line(node), num_bytes))


def _shared_inputs(graph: fx.Graph) -> dict[str, int]:
    """Name -> dimension of inputs of which each rank has a part."""
    found = [annotations.note(node) for node in graph.find_nodes(op="placeholder")]
    return {note.input_name: note.stored[0].dim for note in found if note.stored and not note.is_parameter}


def _user_inputs(graph: fx.Graph) -> list[str]:
    """Names of the tensors the user passes: inputs that are not the module's own."""
    names = [annotations.note(n).input_name for n in graph.nodes if n.op == "placeholder" and annotations.is_tensor(n)]
    return [name for name in names if name is not None and "." not in name] or ["(none)"]
