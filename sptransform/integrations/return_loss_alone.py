"""Return only what has no sequence, where the trainer that calls uses nothing else.

``(%loss, %logits)`` becomes ``(%loss, None)``. A call that returns no number, and so no loss, stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from types import MethodType
from typing import Any, ClassVar

from torch import fx, nn

from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow
from sptransform.passes.normalize.drop_sequences import DropSequences


class LossAlone:
    """Whether calls of a model return the loss alone. Dynamo compiles either way by itself."""

    def __init__(self) -> None:
        self.is_enough = False

    def of(self, model: nn.Module) -> None:
        """Decide what calls of ``model`` return."""
        forward = model.forward.__func__  # not bound, or a copy of the model would run this one

        @wraps(forward)
        def read_first(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._sptransform_loss_alone.is_enough:  # Dynamo makes each side of a branch a graph of its own
                pass
            return forward(self, *args, **kwargs)

        model._sptransform_loss_alone = self
        model.forward = MethodType(read_first, model)

    @contextmanager
    def enough(self, is_enough: bool) -> Iterator[None]:
        """Within it calls return the loss alone, if ``is_enough``."""
        before, self.is_enough = self.is_enough, is_enough
        try:
            yield
        finally:
            self.is_enough = before


@dataclass(frozen=True)
class ReturnLossAlone(Pass):
    loss_alone: LossAlone = field(repr=False)

    requires: ClassVar[frozenset[str]] = frozenset({"functional"})
    ensures: ClassVar[frozenset[str]] = frozenset({"functional"})
    after: ClassVar[str] = "RecognizeScans"  # where DropSequences runs

    def run(self, graph: fx.Graph, context: Context) -> None:
        returned = [x for x in dataflow.operands(graph.output_node()) if dataflow.handles_tensors(x)]
        if self.loss_alone.is_enough and any(not dataflow.shape(x) for x in returned):
            DropSequences().run(graph, replace(context, outputs="loss"))
