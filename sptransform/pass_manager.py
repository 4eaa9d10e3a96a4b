"""Passes over a graph, what each needs and promises, and the manager that checks both after every pass."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import fx

from sptransform import verifier
from sptransform.errors import VerificationError
from sptransform.mesh import Mesh
from sptransform.partition import Partition
from sptransform.placement import Placement
from sptransform.printer import text
from sptransform.rule_table import RuleTable
from sptransform.sizes import Size

if TYPE_CHECKING:
    from sptransform.strategies import Strategy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fallback:
    """An op that runs replicated because it has no sharding rule."""

    op: str
    node: str
    source: str | None
    gathered_bytes: int


@dataclass
class Context:
    """What passes share: the request, and what they found out on the way.

    Attributes:
        outputs: "dtensor" or "local" let outputs keep a sharded sequence; "full" gathers them in the graph; "kept", for
            mesh dims before the last, leaves shards as they are.
        grad_sync: whether parameter gradients are reduced over the ranks in the graph.
        strict: whether an op without a rule is an error.
        shard_parameters: whether parameters that are whole in this graph are read as if each rank kept a part.
        num_ranks: of all mesh dims, where this is one of several; else 0.
        sequence_dims: placeholder name -> its sequence dimension.
        fallbacks: ops that run replicated for want of a rule.
        output_placements: what the graph returns, one per output; None for outputs that are no tensors.
        is_causal: once placed: whether any attention of the graph is causal; sequences are laid out for all of it.
        is_even: once distributed: every rank has an equal share of whatever is cut.
        parts: of the request as a whole, the contexts of its mesh dims, in the order in which they were distributed.
    """

    mesh: Mesh
    strategy: Strategy
    rules: RuleTable
    outputs: str = "full"
    grad_sync: bool = True
    strict: bool = False
    shard_parameters: bool = False
    num_ranks: int = 0
    sequence_dims: Mapping[str, int] = field(default_factory=dict)
    fallbacks: list[Fallback] = field(default_factory=list)
    output_placements: tuple[Placement | None, ...] = ()
    is_causal: bool = False
    is_even: bool = True
    parts: tuple[Context, ...] = ()

    def divide(self, size: Size) -> Partition:
        """Who owns what of a sequence of ``size``, once placed."""
        return self.strategy.partition(size, self.mesh.size, self.is_causal)


class Pass:
    """Base: a frozen dataclass whose fields are its options.

    ``requires`` and ``ensures`` name invariants of :mod:`sptransform.verifier`. What a pass requires must have been
    ensured before it; what it ensures is checked on the graph it leaves, together with all that still holds.
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset()
    breaks: ClassVar[frozenset[str]] = frozenset()

    @property
    def name(self) -> str:
        return type(self).__name__

    def run(self, graph: fx.Graph, context: Context) -> None:
        """Rewrite ``graph`` in place."""
        raise NotImplementedError


# what holds of a graph before the first pass, and once all mesh dims are done
CAPTURED = frozenset({"functional"})
DISTRIBUTED = frozenset({"functional", "local", "lowered"})


def run_passes(
    gm: fx.GraphModule, passes: Sequence[Pass], context: Context, holds: frozenset[str] = CAPTURED
) -> fx.GraphModule:
    """Run ``passes`` in order on ``gm`` in place and return it; ``holds`` are the invariants that it has already.

    Raises:
        VerificationError: a pass lacks what it requires, or leaves a graph that breaks an invariant.
    """
    verifier.check_functional(gm.graph, context)
    ran = ["capture"]
    for step in passes:
        missing = step.requires - holds
        if missing:
            raise VerificationError(f"{step.name} requires {', '.join(sorted(missing))}; ran: {', '.join(ran)}")
        start = time.perf_counter()
        step.run(gm.graph, context)
        ran.append(step.name)
        holds = (holds - step.breaks) | step.ensures
        try:
            gm.graph.lint()
            for invariant in sorted(holds):
                verifier.INVARIANTS[invariant](gm.graph, context)
        except VerificationError as error:
            raise VerificationError(f"after {' > '.join(ran)}:\n{error}") from error
        log.debug("%s took %.3f s", step.name, time.perf_counter() - start)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("after %s:\n%s", step.name, text(gm.graph.nodes))
    gm.recompile()
    return gm


