"""Two strategies together: one that splits the sequence, and tensor parallelism within its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sptransform.diagnostics.errors import UsageError, describe
from sptransform.engine.strategy import Divide, Strategy
from sptransform.rules.decision import Sharded
from sptransform.rules.rule import OpRule
from sptransform.sharding.mesh import Mesh
from sptransform.sharding.partition import Partition
from sptransform.strategies.megatron import MegatronSP
from sptransform.strategies.ring import AllGatherKV, Ring
from sptransform.strategies.ulysses import Ulysses


@dataclass(frozen=True)
class Composed(Strategy):
    """One strategy per mesh dim: one that splits the sequence, and :class:`MegatronSP` among neighbours.

    This is how Megatron-LM combines context and tensor parallelism: the first mesh dim shards the sequence, and each
    shard is the sequence of the second.

    Args:
        strategies: Ring, AllGatherKV or Ulysses, then MegatronSP.

    Raises:
        UsageError: other strategies; from :func:`parallelize`, a mesh that does not have two dims; at compile time,
            heads that Ulysses cannot divide evenly.
    """

    strategies: tuple[Strategy, ...]
    max_mesh_dims = 2
    shards_weights = True

    def __post_init__(self) -> None:
        kinds = tuple(map(type, self.strategies))
        if len(kinds) != 2 or kinds[0] not in (AllGatherKV, Ring, Ulysses) or kinds[1] is not MegatronSP:
            fix = "one of 'allgather', 'ring', 'ulysses', then 'megatron': the mesh dims in this order"
            raise UsageError(
                describe(
                    "these strategies do not go together",
                    found=str(self),
                    fix="'usp'" if set(kinds) == {Ring, Ulysses} else fix,
                )
            )

    def __str__(self) -> str:
        return " x ".join(map(str, self.strategies))

    @property
    def reads_masks(self) -> bool:  # type: ignore[override]
        return self.strategies[0].reads_masks

    def mesh_shapes(self, num_ranks: int, shape: tuple[int, ...]) -> list[tuple[int, int]]:
        if len(shape) != 2:
            raise UsageError(
                describe(
                    "a mesh has a dim for each strategy",
                    found=f"{self}, a mesh of {' x '.join(map(str, shape))} ranks",
                    fix="mesh=init_device_mesh(.., (2, 2), mesh_dim_names=('cp', 'tp')), or as many ranks as there are",
                )
            )
        return [shape]

    def gathers_for(self, rule: OpRule) -> bool:
        return any(strategy.gathers_for(rule) for strategy in self.strategies)

    def multiple(self, num_ranks: int) -> int:
        return self.strategies[0].multiple(num_ranks)

    def weights_mesh(self, mesh: Mesh) -> Mesh:
        return mesh.split(*mesh.shape)[1]

    def stages(self, mesh: Mesh, heads: Sequence[tuple[int, int]]) -> list[tuple[Strategy, Mesh]]:
        sequence, weights = self.strategies
        outer, inner = mesh.split(*mesh.shape)
        if isinstance(sequence, Ulysses) and sequence.split == "heads" and inner.size > 1:
            _check_heads(self, heads, outer.size, inner.size)
            sequence = _UlyssesOutside(num_inside=inner.size)
        return [stage for stage in ((sequence, outer), (weights, inner)) if stage[1].size > 1]


@dataclass(frozen=True)
class _UlyssesOutside(Ulysses):
    """Ulysses over heads that ``num_inside`` inner ranks divide further.

    The heads consist of one block per inner rank, and the outer ranks divide each block. So the inner ranks can cut
    weights in contiguous blocks.
    """

    num_inside: int = 1

    def place_attention(self, rule: OpRule, num_ranks: int, divide: Divide) -> Sharded:
        decision = super().place_attention(rule, num_ranks, divide)
        block = decision.partition.size // self.num_inside
        return Sharded(decision.factor, Partition.blocks(block, num_ranks).tiled(self.num_inside))


def _check_heads(strategy: Strategy, heads: Sequence[tuple[int, int]], outer: int, inner: int) -> None:
    uneven = [f"{h} query heads, {k} key heads" for h, k in heads if h % (outer * inner) or k % (outer * inner)]
    if uneven:
        raise UsageError(
            describe(
                "Ulysses and tensor parallelism share the heads, and these are no multiple of the ranks",
                found=f"{uneven[0]}, {outer} x {inner} ranks",
                fix="('ring', 'megatron') or ('allgather', 'megatron'), which share the heads over the second dim only",
            )
        )
