"""What the passes of one compile share: the request, and what they found out on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sptransform.engine.strategy import Strategy
from sptransform.rules.table import RuleTable
from sptransform.sharding.mesh import Mesh
from sptransform.sharding.partition import Partition
from sptransform.sharding.placement import Placement
from sptransform.sharding.sizes import Size


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
