"""Return only what has no sequence, where the trainer uses nothing else: while it trains, or under inference mode.

``(%loss, %logits)`` becomes ``(%loss, None)``.

1. A call that returns no number, and so no loss, stays as it is.
2. Under ``no_grad`` it returns everything: whoever evaluates may read it. Dynamo compiles each mode for itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import fx

from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow
from sptransform.integrations.accelerate import Shared
from sptransform.passes.normalize.drop_sequences import DropSequences


@dataclass(frozen=True)
class ReturnLossAlone(Pass):
    shared: Shared = field(repr=False)

    requires: ClassVar[frozenset[str]] = frozenset({"functional"})
    ensures: ClassVar[frozenset[str]] = frozenset({"functional"})
    after: ClassVar[str] = "RecognizeScans"  # where DropSequences runs

    def run(self, graph: fx.Graph, context: Context) -> None:
        is_used_alone = torch.is_grad_enabled() or torch.is_inference_mode_enabled()
        returned = [x for x in dataflow.operands(graph.output_node()) if dataflow.handles_tensors(x)]
        has_loss = any(not dataflow.shape(x) for x in returned)
        if self.shared.uses_loss_alone and is_used_alone and has_loss:
            DropSequences().run(graph, replace(context, outputs="loss"))
