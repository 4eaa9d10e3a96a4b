"""What the passes of one compile are asked for, and what they find."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sptransform.diagnostics.errors import UsageError, describe
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
class Result:
    """What the passes find.

    Attributes:
        fallbacks: ops that run replicated because they have no rule; one list for all mesh dims.
        output_placements: placement of each graph output; None for outputs that are not tensors.
        is_causal: whether any attention of the graph is causal. All sequences get one layout. None before placement.
        is_ordered: whether an op scans a sequence, so that ranks have blocks in order, whatever the strategy.
        is_even: whether all ranks have equal shares and the same graph. None before the mesh dim is distributed.
        mesh_dims: for a whole compile, the contexts of its mesh dims that are distributed, in order.
    """

    fallbacks: list[Fallback] = field(default_factory=list)
    output_placements: tuple[Placement | None, ...] = ()
    is_causal: bool | None = None
    is_ordered: bool = False
    is_even: bool | None = None
    mesh_dims: tuple[Context, ...] = ()


@dataclass(frozen=True)
class Context:
    """What the passes are asked for, over one mesh dim or all; ``result`` is what they find.

    Attributes:
        outputs: "dtensor" or "local" let outputs keep a sharded sequence; "full" gathers them in the graph; "loss" has
            none with a sequence, and gathers; "kept", for mesh dims before the last, leaves shards as they are.
        grad_sync: whether parameter gradients are reduced over the ranks in the graph.
        strict: whether an op without a rule is an error.
        shard_parameters: whether parameters not yet sharded on this mesh dim are read as if each rank kept a shard.
        num_ranks: ranks of all mesh dims together; 0 for a whole compile.
        sequence_dims: placeholder name -> its sequence dimension.
        loss_chunk: of how many tokens the logits of a loss exist at a time; None: of all; "auto": as memory asks.
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
    loss_chunk: int | str | None = None
    result: Result = field(default_factory=Result)

    @property
    def returns_whole(self) -> bool:
        """Whether the graph gathers the shards that it returns."""
        return self.outputs in ("full", "loss")

    def divide(self, size: Size) -> Partition:
        """Partition of a sequence of ``size``; valid once ``result.is_causal`` and ``result.is_ordered`` are set.

        Raises:
            UsageError: the strategy gives an index to no rank, or to several.
        """
        if self.result.is_ordered:
            return Partition.contiguous(size, self.mesh.size)
        found = self.strategy.partition(size, self.mesh.size, self.result.is_causal)
        if found.size != size or found.num_ranks != self.mesh.size or not found.is_exact:
            raise UsageError(
                describe(
                    f"{self.strategy} lays out sequences so that an index has no owner, or several",
                    found=f"{found} for a sequence of {size} on {self.mesh.size} ranks",
                    fix="a Partition of that size, each index of one rank",
                )
            )
        return found
