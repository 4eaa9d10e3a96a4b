"""The base of every strategy: how it lays out sequences, and how it places attention."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import fx
from torch.distributed.device_mesh import DeviceMesh

from sptransform.diagnostics.errors import UsageError, describe, shown
from sptransform.diagnostics.said_once import OnceLogger
from sptransform.engine.axes import Axes
from sptransform.engine.inner_axes import InnerAxes
from sptransform.parameters.parts import first_dim
from sptransform.rules.decision import Decision, Sharded
from sptransform.rules.rule import OpRule
from sptransform.sharding.mesh import Mesh, device_mesh_of
from sptransform.sharding.partition import Partition
from sptransform.sharding.placement import Placement
from sptransform.sharding.sizes import Size

Divide = Callable[[str], Partition]

log = OnceLogger(__name__)


class Stage(NamedTuple):
    """A strategy on its mesh dim. ``shards_parameters``: whether parameters in parts are kept over this mesh dim."""

    strategy: Strategy
    mesh: Mesh
    shards_parameters: bool = True


class Strategy:
    """Base: how sequences are laid out, and where attention runs, on one mesh dim.

    A strategy that only places is a subclass with :meth:`place_attention`; :func:`sptransform.parallelize` takes an
    instance of it. The other methods and attributes have defaults for a strategy that splits the sequence.

    Attributes:
        reads_masks: whether every attention is one that knows positions, with masks as programs over them. A strategy
            that cuts queries or keys needs it; under others only masks that are computed from positions are read.
        max_mesh_dims: maximum number of mesh dims.
        regather: whether tensors gathered for attention or a linear are gathered again in the backward.
        shards_weights: whether linears are cut along their inner axes, and their weights with them.
        chooses: whether it is none itself, but chooses one for each graph, see :meth:`choose`.
        reason: of a strategy that was chosen, why.
    """

    reads_masks: ClassVar[bool] = False
    max_mesh_dims: ClassVar[int] = 1
    regather: ClassVar[bool] = False
    shards_weights: ClassVar[bool] = False
    chooses: ClassVar[bool] = False
    reason: ClassVar[str] = ""

    def __repr__(self) -> str:
        return shown(self)

    def mesh_of(self, device_mesh: DeviceMesh | None) -> Mesh:
        """The ranks of a DeviceMesh; by default all ranks of the default group.

        The subgroups that the strategy may need are made here, where every rank takes part.

        Raises:
            UsageError: no process group is initialised, or the strategy does not support the mesh.
        """
        device_mesh = device_mesh_of(device_mesh)
        shape = tuple(device_mesh.shape)
        self._check_dims(shape, f"a mesh of shape {shape} with dims {device_mesh.mesh_dim_names}")
        shapes = self.mesh_shapes(device_mesh.size(), shape)
        mesh = Mesh.of(device_mesh)
        for degrees in shapes:
            mesh.split(*degrees)
        return mesh

    def pretended_mesh(self, world_size: int | tuple[int, ...], rank: int = 0) -> Mesh:
        """:meth:`Mesh.pretended`, checked.

        Raises:
            UsageError: an impossible rank, or a mesh that the strategy does not support.
        """
        mesh = Mesh.pretended(world_size, rank)
        self._check_dims(mesh.shape, f"world_size={world_size}")
        self.mesh_shapes(mesh.size, mesh.shape)
        return mesh

    def _check_dims(self, shape: tuple[int, ...], found: str) -> None:
        if len(shape) > self.max_mesh_dims:
            takes = "one mesh dim" if self.max_mesh_dims == 1 else f"at most {self.max_mesh_dims} mesh dims"
            fix = "pass one dim of it, e.g. mesh['sp']"
            raise UsageError(describe(f"{type(self).__name__} takes {takes}", found=found, fix=fix))

    def mesh_shapes(self, num_ranks: int, shape: tuple[int, ...]) -> list[tuple[int, int]]:
        """The two-dim shapes into which the strategy may split a mesh of ``shape``.

        Raises:
            UsageError: the mesh is not one the strategy can use.
        """
        return []

    def stages(self, mesh: Mesh, heads: Sequence[tuple[int, int]]) -> list[Stage]:
        """The strategies to apply one after the other, each on its mesh dim.

        ``heads`` has (query heads, key heads) of every attention op of the graph.
        """
        return [Stage(self, mesh)]

    def around(self, num_ranks: int, num_inside: int, heads: Sequence[tuple[int, int]]) -> Strategy:
        """This strategy on ``num_ranks`` ranks, each of whose shards ``num_inside`` ranks of another dim cut further.

        ``heads`` as in :meth:`stages`.

        Raises:
            UsageError: the strategy does not leave shards that can be cut so.
        """
        return self

    def weights_mesh(self, mesh: Mesh) -> Mesh:
        """The ranks of ``mesh`` that parameters are sharded over, if they are."""
        return mesh

    def storage_shape(self, num_ranks: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The mesh shape over which the ranks of a mesh of ``shape`` keep shards of parameters (``shard_parameters``).

        Raises:
            UsageError: the shape depends on the model.
        """
        return shape

    def partition(self, size: Size, num_ranks: int, is_causal: bool) -> Partition:
        """Partition of a sequence; ``is_causal``: whether the graph's attention is. Default: contiguous blocks."""
        return Partition.contiguous(size, num_ranks)

    def multiple(self, num_ranks: int) -> int | None:
        """One graph serves all lengths that are multiples of this number; None if each length has one of its own."""
        return num_ranks

    def gathers_for(self, rule: OpRule) -> bool:
        """Whether gathering the operands of an op with ``rule`` is the strategy's plan: by default, of attention."""
        return bool(rule.roles)

    def inner_axes(
        self, graph: fx.Graph, axes: Axes, num_ranks: int, light: frozenset[fx.Node]
    ) -> InnerAxes | None:
        """The axes to cut in preference to the sequence; None if only the sequence is cut."""
        return None

    def stored_dim(
        self, shape: Sequence[Size], demanded: Sequence[Placement], num_ranks: int, is_stored: bool
    ) -> int | None:
        """The dimension along which ranks keep parts of a parameter; None if every rank keeps all of it.

        Args:
            shape: of the parameter.
            demanded: the placements in which the graph reads it.
            num_ranks: ranks of all mesh dims together.
            is_stored: whether an earlier mesh dim has cut it.
        """
        return 0 if is_stored else first_dim(shape, num_ranks)

    def choose(
        self,
        gm: fx.GraphModule,
        inputs: list[Any],
        trials: Callable[[fx.GraphModule, list[Any], Collection[str]], Callable[[Strategy, tuple[int, ...], int], Any]],
        mesh: Mesh,
        in_parts: bool,
    ) -> Strategy:
        """The strategy to take for a graph; every rank comes to the same one.

        Args:
            gm: the graph, as Dynamo gives it.
            inputs: what it is called with.
            trials: (a graph, its inputs, modules whose parameters are kept apart) -> (a strategy, the ranks of each
                mesh dim, a rank) -> what the rank would run, as :func:`sptransform.rewrite` gives it.
            mesh: the ranks.
            in_parts: whether ranks keep parts of parameters (``shard_parameters``).

        Raises:
            UsageError: none can run the graph.
        """
        return self

    def place_attention(self, rule: OpRule, num_ranks: int, divide: Divide) -> Decision:
        """The decision for an attention op with ``rule``; ``divide(factor)`` returns the partition of a factor.

        Raises:
            UsageError: the strategy cannot cut it.
        """
        raise NotImplementedError


def of_own_queries(rule: OpRule, divide: Divide) -> Sharded | None:
    """Each rank computes its own queries over all keys: for attention of one head, which heads cannot divide.

    None where queries cannot be cut, as under a causal mask that no strategy reads.
    """
    queries = rule.roles["queries"]
    decision = Sharded(queries, divide(queries))
    if not decision.is_allowed(rule):
        return None
    log.warning("an attention has one head: each rank computes its own queries, over keys that are gathered")
    return decision


def check_choice(strategy: Strategy, name: str, *choices: Any) -> None:
    value = getattr(strategy, name)
    if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in choices):
        raise UsageError(
            describe(
                f"unknown {name} of {type(strategy).__name__}",
                found=f"{name}={value!r}",
                fix=" or ".join(map(repr, choices)),
            )
        )
