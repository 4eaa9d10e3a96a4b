"""The four placements of a tensor over the ranks, their transposes, and their printed form.

A placement types a value *and* its gradient (the SPMD types of JAX's shard_map and of spmd_types):

    ======  =====================================  ==================================
    place   value                                  gradient
    ======  =====================================  ==================================
    S(dim)  each rank holds its part of ``dim``    each rank holds the same part
    R       every rank holds the value             a pending sum over the ranks
    I       every rank holds the value             every rank holds the gradient
    P       a pending sum over the ranks           every rank holds the gradient
    ======  =====================================  ==================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor

from sptransform.sharding.partition import Partition
from sptransform.sharding.sizes import Size, SymbolicSizeError


@dataclass(frozen=True)
class Placement:
    """Base of the four placements."""


@dataclass(frozen=True)
class Replicated(Placement):
    def __str__(self) -> str:
        return "R"


@dataclass(frozen=True)
class Invariant(Placement):
    def __str__(self) -> str:
        return "I"


@dataclass(frozen=True)
class Partial(Placement):
    def __str__(self) -> str:
        return "P"


@dataclass(frozen=True)
class Shard(Placement):
    """Dimension ``dim`` is cut along one of its axes.

    The dimension is the product ``outer x partition.size`` (row-major), so a flattened ``[B*S, V]`` whose S is
    cut is ``Shard(0, partition of S, outer=B)``; a plain dimension has ``outer = 1``. Axes inside the cut
    axis need no third number: its partition is refined by them.
    """

    dim: int
    partition: Partition
    outer: Size = 1

    @property
    def dim_size(self) -> Size:
        """Global size of the dimension."""
        return self.outer * self.partition.size

    @property
    def is_contiguous(self) -> bool:
        """Whether DTensor's ``Shard(dim)`` is the same cut."""
        return self.outer == 1 and self.partition.is_contiguous

    @property
    def flat(self) -> Shard:
        """The same cut of the dimension as one axis. Raises SymbolicSizeError if its size is open."""
        if self.outer == 1:
            return self
        if not isinstance(self.dim_size, int) or not isinstance(self.outer, int):
            raise SymbolicSizeError(f"cannot list the parts of {self.dim_size} indices")
        return Shard(self.dim, self.partition.tiled(self.outer))

    def local_dim_size(self, rank: int) -> Size:
        return self.outer * self.partition.local_size(rank)

    def local_shape(self, shape: tuple[Size, ...], rank: int) -> tuple[Size, ...]:
        """Shape of rank's part of a tensor of global ``shape``. Raises ValueError if the dimension differs."""
        if shape[self.dim] != self.dim_size:
            raise ValueError(f"dimension {self.dim} of {tuple(shape)} is not the {self.dim_size} of {self.spec}")
        return (*shape[: self.dim], self.local_dim_size(rank), *shape[self.dim + 1 :])

    def held(self, placement: Placement, rank: int) -> Shard:
        """This cut, restricted to the slice that ``rank`` owns under ``placement`` on another mesh dim."""
        if not isinstance(placement, Shard) or placement.dim != self.dim:
            return self
        return replace(self, partition=self.partition.within(placement.partition.tiled(placement.outer).owned[rank]))

    def __str__(self) -> str:
        return f"S({self.dim})"

    @property
    def spec(self) -> str:
        """The complete placement as text, the form that ops of the rewritten graph take: ``S(0:2*64/4)``."""
        if not isinstance(self.outer, int):
            raise SymbolicSizeError(f"cannot print {self.outer} times a partition")
        outer = f"{self.outer}*" if self.outer != 1 else ""
        return f"S({self.dim}:{outer}{self.partition})"

    @staticmethod
    def parse(text: str, part: Tensor | None = None, full: Tensor | None = None) -> Shard:
        """Inverse of ``spec``; an open size (``?``) is read from the local tensor ``part`` or the full ``full``.

        Raises:
            ValueError: other text, or an open size and no tensor.
        """
        dim, outer, partition = split_spec(text)
        if "?" not in partition:
            return Shard(dim, Partition.parse(partition), outer)
        if part is not None:
            return Shard(dim, Partition.parse(partition, part=part.shape[dim] // outer), outer)
        if full is not None:
            return Shard(dim, Partition.parse(partition, size=full.shape[dim] // outer), outer)
        raise ValueError(f"not a shard: {text!r}")


@lru_cache(maxsize=4096)
def split_spec(text: str) -> tuple[int, int, str]:
    """``dim``, ``outer`` and the partition's text of a :attr:`Shard.spec`. Raises ValueError on other text."""
    match = re.fullmatch(r"S\((\d+):(?:(\d+)\*)?([^*]+)\)", text)
    if match is None:
        raise ValueError(f"not a shard: {text!r}")
    return int(match[1]), int(match[2] or 1), match[3]


R = Replicated()
I = Invariant()  # noqa: E741 - the type's name everywhere in the field's notation and in this project
P = Partial()


def local_shape(placement: Placement, shape: tuple[Size, ...], rank: int) -> tuple[Size, ...]:
    """Local shape on ``rank`` of a tensor of global ``shape``."""
    return placement.local_shape(shape, rank) if isinstance(placement, Shard) else tuple(shape)


# (from, to) -> (forward collective, backward collective); S stands for any Shard. Korthikanti et al. 2205.05198
# figure 4 has the two all-gather/reduce-scatter pairs; the rest follow from transposition.
TRANSITIONS: dict[tuple[str, str], tuple[str | None, str | None]] = {
    ("I", "P"): (None, None),
    ("I", "R"): (None, "all_reduce"),
    ("I", "S"): (None, "all_gather"),
    ("P", "I"): ("all_reduce", None),
    ("P", "R"): ("all_reduce", "all_reduce"),
    ("P", "S"): ("reduce_scatter", "all_gather"),
    ("R", "I"): (None, None),
    ("R", "S"): (None, None),
    ("S", "I"): ("all_gather", None),
    ("S", "R"): ("all_gather", "reduce_scatter"),
    ("S", "S"): ("all_to_all", "all_to_all"),
}


def kind(placement: Placement) -> str:
    """The placement's letter: S, R, I or P."""
    return str(placement)[0]


def cut_alike(source: Placement, target: Placement) -> bool:
    """Whether both are shards of the same dimension."""
    return isinstance(source, Shard) and isinstance(target, Shard) and source.dim == target.dim


def repartitions(source: Placement, target: Placement) -> bool:
    """Whether indices only move between ranks: same axis, and before it one owner of each index.

    The axis of contiguous chunks of a whole dimension of known size may be a flattened one.
    """
    if not isinstance(source, Shard) or not isinstance(target, Shard) or not cut_alike(source, target):
        return False
    before, after = source.partition, target.partition
    same_axis = source.outer == target.outer and before.size == after.size
    is_flattened = target.is_contiguous and isinstance(source.dim_size, int) and source.dim_size == target.dim_size
    return (same_axis or is_flattened) and before.is_exact


def keeps_own(source: Placement, target: Placement) -> bool:
    """Whether every shared index just stays with the first of its owners: nothing is sent."""
    if not isinstance(source, Shard) or not isinstance(target, Shard) or source.partition.is_exact:
        return False
    return target == replace(source, partition=source.partition.first_owners())


def needs_full_tensor(source: Placement, target: Placement) -> bool:
    """Whether shards of one dimension differ in more than ownership, so that the full tensor is needed in between."""
    return cut_alike(source, target) and not (repartitions(source, target) or keeps_own(source, target))


def transition(source: Placement, target: Placement) -> tuple[str | None, str | None]:
    """(forward collective, backward collective) of a change of placement."""
    return (None, None) if keeps_own(source, target) else TRANSITIONS[kind(source), kind(target)]
