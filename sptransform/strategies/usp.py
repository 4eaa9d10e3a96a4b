"""USP: Ulysses among neighbouring ranks, rings among groups of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar

from sympy import divisors

from sptransform.diagnostics.errors import UsageError, describe
from sptransform.engine.strategy import Stage, Strategy
from sptransform.sharding.mesh import Mesh
from sptransform.strategies.ring import Ring, check_layout
from sptransform.strategies.ulysses import Ulysses


@dataclass(frozen=True)
class USP(Strategy):
    """Ulysses among neighbouring ranks, rings among groups of them (Fang and Zhao, USP, arXiv 2405.07719).

    The number of ranks is N = ``ulysses * ring``. Consecutive ranks share the heads; on a mesh of two dims, the first
    is the ring. A degree that is not given is chosen at compile time: the pair that sends least, see :meth:`degrees`.

    Args:
        ulysses: the number of ranks that heads are split over.
        ring: the number of ranks in a ring.
        layout: as in :class:`Ring`.
        block: as in :class:`Ring`.

    Raises:
        UsageError: a degree is not a positive int, or an invalid ``layout`` or ``block``; from :func:`parallelize`,
            degrees whose product is not the number of ranks.
    """

    ulysses: int | None = None
    ring: int | None = None
    layout: str = "zigzag"
    block: int | None = field(default=None, kw_only=True)
    reads_masks: ClassVar[bool] = True
    max_mesh_dims: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_layout(self)
        for name in ("ulysses", "ring"):
            degree = getattr(self, name)
            if degree is not None and (not isinstance(degree, int) or isinstance(degree, bool) or degree < 1):
                raise UsageError(
                    describe(f"{name} of USP is a number of ranks", found=f"{name}={degree!r}", fix="1 or more")
                )

    @property
    def _ring(self) -> Ring:
        return Ring(self.layout, block=self.block)

    def multiple(self, num_ranks: int) -> int | None:
        return self._ring.multiple(num_ranks)

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
        """The (ring, ulysses) that sends the fewest elements forward; on a tie the shortest ring, for fewest messages.

        Per attention layer of H query and K key heads, in units of batch * tokens * head size / N: Ulysses over U ranks
        sends ``2 (H + K) (1 - 1/U)``, a ring of R ranks ``2 K (R - 1)``. Only U that divide all K are considered.
        """
        usable = [u for u in divisors(num_ranks) if all(k % u == 0 for _, k in heads)]
        shapes = [(num_ranks // u, u) for u in usable]
        options = [(r, u) for r, u in shapes if self.ulysses in (None, u) and self.ring in (None, r)]
        if not options:  # the user asked for it: Ulysses is exact with uneven heads too
            options = [(self.ring or num_ranks // self.ulysses, self.ulysses or num_ranks // self.ring)]

        def sent(degrees: tuple[int, int]) -> Fraction:
            r, u = degrees
            return sum((2 * (h + k) * (1 - Fraction(1, u)) + 2 * k * (r - 1) for h, k in heads), Fraction(0))

        return min(reversed(options), key=sent)

    def stages(self, mesh: Mesh, heads: Sequence[tuple[int, int]]) -> list[Stage]:
        if len(mesh.shape) == 2:
            ring, ulysses = mesh.shape
        else:
            ring, ulysses = self.degrees(mesh.size, heads)
        if 1 in (ring, ulysses):
            return [Stage(self._ring if ulysses == 1 else Ulysses(), mesh)]
        outer, inner = mesh.split(ring, ulysses)
        return [Stage(self._ring, outer), Stage(Ulysses(), inner)]
