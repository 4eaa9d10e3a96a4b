"""What each strategy asks of attention; frozen dataclasses, validated when made. Propagation does the rest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

from sympy import divisors
from torch.distributed.device_mesh import DeviceMesh

from sptransform.decisions import Circular, Decision, Sharded
from sptransform.errors import UsageError, describe
from sptransform.mesh import Mesh, device_mesh_of
from sptransform.partition import Partition
from sptransform.rules import OpRule
from sptransform.sizes import Size

log = logging.getLogger(__name__)

Divide = Callable[[str], Partition]


class Strategy:
    """Base: how sequences are laid out, and where attention runs, on one mesh dim.

    Attributes:
        reads_masks: whether attention takes masks as programs over positions, instead of as tensors of scores' shape.
        max_mesh_dims: of how many dims the mesh may be.
        regather: whether what attention, or a linear, needs gathered is gathered again in the backward.
        shards_weights: whether linears are cut along their inner axes, and their weights with them.
    """

    reads_masks: ClassVar[bool] = False
    max_mesh_dims: ClassVar[int] = 1
    regather: ClassVar[bool] = False
    shards_weights: ClassVar[bool] = False

    def mesh_of(self, device_mesh: DeviceMesh | None) -> Mesh:
        """The ranks of a DeviceMesh; by default all ranks of the default group.

        Process groups of parts of it are made here, where every rank comes, if the strategy may need some.

        Raises:
            UsageError: no process group is initialised, or the mesh is not what the strategy takes.
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
            UsageError: an impossible rank, or a mesh that is not what the strategy takes.
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
        """As which meshes of two dims the ranks of a mesh of ``shape`` may come to be used.

        Raises:
            UsageError: the mesh is not one the strategy can use.
        """
        return []

    def stages(self, mesh: Mesh, heads: Sequence[tuple[int, int]]) -> list[tuple[Strategy, Mesh]]:
        """The strategies to apply one after the other, each on its mesh dim.

        ``heads`` has (query heads, key heads) of every attention op of the graph.
        """
        return [(self, mesh)]

    def weights_mesh(self, mesh: Mesh) -> Mesh:
        """Of ``mesh``, the ranks among which parameters are shared, if they are."""
        return mesh

    def storage_shape(self, num_ranks: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """As which mesh the ranks of a mesh of ``shape`` share parameters that none of them needs to have whole.

        Raises:
            UsageError: that depends on the model.
        """
        return shape

    def partition(self, size: Size, num_ranks: int, is_causal: bool) -> Partition:
        """Who owns what of a sequence, in a graph whose attention ``is_causal``; contiguous blocks."""
        return Partition.contiguous(size, num_ranks)

    def multiple(self, num_ranks: int) -> int:
        """What a length must be a multiple of for one graph to serve all such lengths."""
        return num_ranks

    def place_attention(self, rule: OpRule, num_ranks: int, divide: Divide) -> Decision:
        """How an attention op with ``rule`` is cut; ``divide(factor)`` says who owns what of a sequence factor.

        Raises:
            UsageError: the strategy cannot cut it.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Ulysses(Strategy):
    """Attention sees the whole sequence of some heads (Jacobs et al., DeepSpeed-Ulysses, arXiv 2309.14509, §3).

    One all-to-all brings queries, keys and values from sequence to head shards, one brings the output back. Key
    heads are moved as they are, not repeated to the number of query heads.

    Args:
        split: what the all-to-all divides among the ranks: "heads", or the "batch" where heads are fewer than ranks or
            do not divide evenly. Uneven numbers are exact; a rank without a share waits for the others.

    Raises:
        UsageError: another ``split``; at compile time, ``split="batch"`` for a batch of one.
    """

    split: str = "heads"

    def __post_init__(self) -> None:
        _check_choice(self, "split", "batch", "heads")

    def place_attention(self, rule: OpRule, num_ranks: int, divide: Divide) -> Sharded:
        factor = rule.roles.get(self.split)
        if factor is None:
            raise UsageError(
                describe(
                    f"Ulysses(split={self.split!r}) has nothing to split",
                    found=f"an attention of one {'head' if self.split == 'heads' else 'sequence'}",
                    fix="Ulysses(split='heads')" if self.split == "batch" else "Ulysses(split='batch')",
                )
            )
        size = rule.sizes[factor]
        if size < num_ranks:
            log.warning("%d of %d ranks have no %s in attention", num_ranks - size, num_ranks, self.split)
        return Sharded(factor, Partition.balanced(size, num_ranks))


@dataclass(frozen=True)
class _QueriesStay(Strategy):
    """Base: each rank computes the attention of its own queries.

    Args:
        layout: "zigzag" gives each rank one block from the front and one from the back of the sequence, so that a
            causal mask leaves all ranks equal work (Llama 3, arXiv 2407.21783, §3.3.2); a model without causal
            attention is laid out "contiguous" all the same.
    """

    layout: str = "zigzag"
    reads_masks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_choice(self, "layout", "contiguous", "zigzag")

    def partition(self, size: Size, num_ranks: int, is_causal: bool) -> Partition:
        if is_causal and self.layout == "zigzag":
            return Partition.zigzag(size, num_ranks)
        return Partition.contiguous(size, num_ranks)

    def multiple(self, num_ranks: int) -> int:
        return 2 * num_ranks if self.layout == "zigzag" else num_ranks


@dataclass(frozen=True)
class Ring(_QueriesStay):
    """Queries stay, keys and values go round the ranks (Liu et al., Ring Attention, arXiv 2310.01889).

    Any number of ranks, heads and tokens. A hop travels while the block before it is computed; nothing that grows with
    the number of ranks is saved for the backward, which is a ring of its own.

    Args:
        layout: "zigzag" gives each rank one block from the front and one from the back of the sequence, so that a
            causal mask leaves all ranks equal work (Llama 3, arXiv 2407.21783, §3.3.2); a model without causal
            attention is laid out "contiguous" all the same.
        kv: how keys and values reach the queries: on the "ring", or by an "allgather" as in :class:`AllGatherKV`.

    Raises:
        UsageError: another ``layout`` or ``kv``.
    """

    kv: str = "ring"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice(self, "kv", "allgather", "ring")

    def place_attention(self, rule: OpRule, num_ranks: int, divide: Divide) -> Decision:
        queries, keys = rule.roles["queries"], rule.roles.get("keys")
        if self.kv == "allgather" or keys not in rule.circling:
            return Sharded(queries, divide(queries))
        return Circular(queries, divide(queries), keys, divide(keys))


@dataclass(frozen=True)
class USP(Strategy):
    """Ulysses among neighbouring ranks, rings among groups of them (Fang and Zhao, USP, arXiv 2405.07719).

    Of N = ``ulysses * ring`` ranks, those with consecutive numbers share the heads; a mesh of two dims has the ring
    first. What is not given is chosen when the model is compiled: the pair that sends least, see :meth:`degrees`.

    Args:
        ulysses: over how many ranks heads are split.
        ring: how many ranks a ring has.
        layout: as of :class:`Ring`.

    Raises:
        UsageError: no positive number of ranks, or another ``layout``; numbers that do not multiply to the ranks there
            are, from :func:`parallelize`.
    """

    ulysses: int | None = None
    ring: int | None = None
    layout: str = "zigzag"
    reads_masks: ClassVar[bool] = True
    max_mesh_dims: ClassVar[int] = 2

    def __post_init__(self) -> None:
        _check_choice(self, "layout", "contiguous", "zigzag")
        for name in ("ulysses", "ring"):
            degree = getattr(self, name)
            if degree is not None and (not isinstance(degree, int) or isinstance(degree, bool) or degree < 1):
                raise UsageError(
                    describe(f"{name} of USP is a number of ranks", found=f"{name}={degree!r}", fix="1 or more")
                )

    def multiple(self, num_ranks: int) -> int:
        return Ring(self.layout).multiple(num_ranks)

    def mesh_shapes(self, num_ranks: int, shape: tuple[int, ...]) -> list[tuple[int, int]]:
        fitting = self._fitting(num_ranks, shape)
        if not fitting:
            raise UsageError(
                describe(
                    "the ranks are not ring x ulysses",
                    found=f"{self}, a mesh of {' x '.join(map(str, shape))} ranks",
                    fix=f"USP() for {num_ranks} ranks, or numbers whose product is {num_ranks}"
                    + (", the ring as the first mesh dim" if len(shape) == 2 else ""),
                )
            )
        return [(r, u) for r, u in fitting if len(shape) == 2 or (r > 1 and u > 1)]

    def _fitting(self, num_ranks: int, shape: tuple[int, ...]) -> list[tuple[int, int]]:
        options = [shape] if len(shape) == 2 else [(num_ranks // u, u) for u in divisors(num_ranks)]
        return [(r, u) for r, u in options if self.ulysses in (None, u) and self.ring in (None, r)]

    def storage_shape(self, num_ranks: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        fitting = self._fitting(num_ranks, shape)
        if len(shape) == 2 or all(1 in degrees for degrees in fitting):
            return shape
        if len(fitting) == 1:
            return fitting[0]
        raise UsageError(
            describe(
                "how ranks share parameters has to be known before the model's heads are",
                found=f"{self} on {num_ranks} ranks, shard_parameters=True",
                fix="USP(ulysses=.., ring=..), or a mesh of two dims",
            )
        )

    def degrees(self, num_ranks: int, heads: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """(ring, ulysses) that sends the fewest elements forward, and of those the fewest messages: the shortest ring.

        Per attention layer of H query and K key heads, in units of batch * tokens * head size / N: Ulysses over U ranks
        sends ``2 (H + K) (1 - 1/U)``, a ring of R ranks ``2 K (R - 1)``. Only U that divide all K are considered.
        """
        usable = [u for u in divisors(num_ranks) if all(k % u == 0 for _, k in heads)]
        shapes = [(num_ranks // u, u) for u in usable]
        options = [(r, u) for r, u in shapes if self.ulysses in (None, u) and self.ring in (None, r)]
        if not options:  # asked for explicitly: Ulysses with uneven heads is exact too
            options = [(self.ring or num_ranks // self.ulysses, self.ulysses or num_ranks // self.ring)]

        def sent(degrees: tuple[int, int]) -> Fraction:
            r, u = degrees
            return sum((2 * (h + k) * (1 - Fraction(1, u)) + 2 * k * (r - 1) for h, k in heads), Fraction(0))

        return min(reversed(options), key=sent)

    def stages(self, mesh: Mesh, heads: Sequence[tuple[int, int]]) -> list[tuple[Strategy, Mesh]]:
        if len(mesh.shape) == 2:
            ring, ulysses = mesh.shape
        else:
            ring, ulysses = self.degrees(mesh.size, heads)
        if 1 in (ring, ulysses):
            return [(Ring(self.layout) if ulysses == 1 else Ulysses(), mesh)]
        outer, inner = mesh.split(ring, ulysses)
        return [(Ring(self.layout), outer), (Ulysses(), inner)]


@dataclass(frozen=True)
class AllGatherKV(_QueriesStay):
    """Queries stay, keys and values are gathered (Llama 3 context parallelism, arXiv 2407.21783, §3.3.2).

    One all-gather forward, one reduce-scatter of their gradients backward: fewer messages than a ring and as many
    bytes, for the memory of all keys and values of a layer.

    Args:
        layout: as of :class:`Ring`.
        regather: gather keys and values again in the backward instead of saving them.

    Raises:
        UsageError: another ``layout`` or ``regather``.
    """

    regather: bool = False  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice(self, "regather", False, True)

    def place_attention(self, rule: OpRule, num_ranks: int, divide: Divide) -> Decision:
        queries = rule.roles["queries"]
        return Sharded(queries, divide(queries))


@dataclass(frozen=True)
class MegatronSP(Strategy):
    """Linears are cut along their inner axes, everything between them along the sequence.

    Tensor parallelism with sequence parallelism of Megatron-LM (Korthikanti et al., arXiv 2205.05198, §4.2): an
    all-gather before a column-parallel linear, a reduce-scatter after a row-parallel one, and their transposes. Inner
    are the axes that one linear makes and another contracts (heads, through attention; the hidden units of an MLP), and
    the vocabulary. Nothing names them: see :mod:`sptransform.inner_axes`.

    Args:
        regather: save a rank's part of what was gathered for a linear and gather it again in the backward (§4.2.2),
            instead of saving the whole.

    Raises:
        UsageError: another ``regather``; at compile time, attention of one head.
    """

    regather: bool = True  # type: ignore[misc]
    shards_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_choice(self, "regather", False, True)

    def place_attention(self, rule: OpRule, num_ranks: int, divide: Divide) -> Sharded:
        heads = rule.roles.get("heads")
        if heads is None:
            raise UsageError(
                describe(
                    "MegatronSP has nothing to split",
                    found="an attention of one head",
                    fix="a strategy that splits the sequence in attention: 'ring' or 'allgather'",
                )
            )
        return Sharded(heads, divide(heads))


def _check_choice(strategy: Strategy, name: str, *choices: Any) -> None:
    value = getattr(strategy, name)
    if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in choices):
        raise UsageError(
            describe(
                f"unknown {name} of {type(strategy).__name__}",
                found=f"{name}={value!r}",
                fix=" or ".join(map(repr, choices)),
            )
        )
