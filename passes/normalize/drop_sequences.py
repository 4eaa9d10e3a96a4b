"""Return only what has no sequence: with ``outputs="loss"``, a loss and not the logits it was made of.

Before: ``return (%loss, %logits, %keys)``; after: ``return (%loss, None, None)``.

1. A tensor has a sequence if one of its axes is a sequence, or holds one: ``[batch * sequence, ..]``.
2. What only dropped tensors need is not computed.
3. If nothing is left to return, the model has no loss in this call, which is an error.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import fx

from sptransform.diagnostics.errors import UsageError, describe
from sptransform.engine.axes import Axes
from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow, notes
from sptransform.graph.calls import rule_at

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DropSequences(Pass):
    requires = frozenset({"functional"})
    ensures = frozenset({"functional"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        if context.outputs != "loss":
            return
        returned = graph.output_node()
        dropped = _with_sequences(graph, context)
        kept = [x for x in dataflow.operands(returned) if x not in dropped]
        if dropped and not kept:
            raise UsageError(
                describe(
                    "outputs='loss' returns tensors without a sequence, and this call has none",
                    found=", ".join(f"%{x.name} {list(dataflow.shape(x))}" for x in dropped),
                    node=next(iter(dropped)),
                    fix="pass labels, so that there is a loss; or outputs='dtensor'",
                )
            )
        if dropped:
            log.info("not returned, since outputs='loss': %s", ", ".join(f"%{x.name}" for x in dropped))
            returned.args = fx.map_arg(returned.args, lambda x: None if x in dropped else x)
            graph.eliminate_dead_code()


def _with_sequences(graph: fx.Graph, context: Context) -> dict[fx.Node, None]:
    """What the graph returns with a sequence, in order."""
    nodes = [node for node in graph.nodes if dataflow.handles_tensors(node)]
    for node in nodes:
        notes.note(node).rule = rule_at(node, context.rules)
    axes = Axes(graph, context.divide, context.sequence_dims)
    for node in nodes:
        notes.note(node).rule = None  # to be given once no pass changes the graph any more
    returned = dataflow.operands(graph.output_node())
    return {x: None for x in returned if any(axes.is_sequence(atom) for atoms in axes.dims(x) for atom in atoms)}
