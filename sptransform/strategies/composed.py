"""Two strategies together: one that splits the sequence, and tensor parallelism within its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sptransform.diagnostics.errors import UsageError, describe
from sptransform.engine.strategy import Stage, Strategy
from sptransform.rules.rule import OpRule
from sptransform.sharding.mesh import Mesh


@dataclass(frozen=True)
class Composed(Strategy):
    """One strategy per mesh dim: one that splits the sequence, and one that cuts weights among neighbours.

    This is how Megatron-LM combines context and tensor parallelism: the first mesh dim shards the sequence, and each
    shard is the sequence of the second.

    Args:
        strategies: one that splits the sequence (Ring, AllGatherKV, Ulysses), then one that cuts weights (MegatronSP).

    Raises:
        UsageError: other strategies; from :func:`parallelize`, a mesh that does not have two dims; at compile time,
            heads that Ulysses cannot divide evenly.
    """

    strategies: tuple[Strategy, ...]
    max_mesh_dims = 2
    shards_weights = True

    def __post_init__(self) -> None:
        cuts_weights = [strategy.shards_weights for strategy in self.strategies]
        if cuts_weights != [False, True] or any(strategy.max_mesh_dims > 1 for strategy in self.strategies):
            raise UsageError(
                describe(
                    "these strategies do not go together",
                    found=str(self),
                    fix="one that splits the sequence over one mesh dim ('allgather', 'ring', 'ulysses'), then one "
                    "that cuts weights ('megatron'); 'usp' is ring x ulysses",
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

    def multiple(self, num_ranks: int) -> int | None:
        return self.strategies[0].multiple(num_ranks)

    def weights_mesh(self, mesh: Mesh) -> Mesh:
        return mesh.split(*mesh.shape)[1]

    def stages(self, mesh: Mesh, heads: Sequence[tuple[int, int]]) -> list[Stage]:
        sequence, weights = self.strategies
        outer, inner = mesh.split(*mesh.shape)
        if inner.size > 1:
            sequence = sequence.around(outer.size, inner.size, heads)
        found = Stage(sequence, outer, shards_parameters=False), Stage(weights, inner)
        return [stage for stage in found if stage.mesh.size > 1]
