"""A ring's timeline: what every rank computes at every step, under each layout, in pairs of a query and a key."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from sptransform.compiler.rewrite import Rewritten
from sptransform.graph import notes
from sptransform.inspection.work_of_ranks import visible
from sptransform.ops.ring.plan import attended_pairs
from sptransform.rules.decision import RingDecision
from sptransform.sharding.partition import Partition

LAYOUTS = ("zigzag", "contiguous", "striped")


@dataclass(frozen=True)
class RingShape:
    """What the lanes of a ring depend on: equal ones are drawn once.

    Attributes:
        num_ranks: ranks in the ring.
        queries, keys: tokens of the whole sequences.
        nearest, farthest: a query at i sees the keys j with ``nearest <= i - j <= farthest``; None is no limit.
        layout: the one that the strategy has; None for another.
    """

    num_ranks: int
    queries: int
    keys: int
    nearest: int | None
    farthest: int | None
    layout: str | None

    @property
    def is_causal(self) -> bool:
        return self.nearest is not None and self.nearest >= 0


def rings_of(rewritten: Rewritten) -> Iterator[tuple[fx.Node, RingShape]]:
    """Every ring of the graph. The mask is its band of distances; what else it hides depends on data."""
    parts = rewritten.context.result.mesh_dims
    for node in rewritten.graph_module.graph.nodes:
        for part, (rule, decision) in zip(parts, notes.decided(node), strict=False):
            if isinstance(decision, RingDecision):
                sizes = [rule.sizes[rule.roles[role]] for role in ("queries", "keys")]
                band, _ = visible(node, False)
                yield (
                    node,
                    RingShape(part.mesh.size, *sizes, band.nearest, band.farthest, layout_of(decision.partition)),
                )


def layout_of(partition: Partition) -> str | None:
    """The layout's name, if it is one of :data:`LAYOUTS`."""
    made = {name: getattr(Partition, name)(partition.size, partition.num_ranks) for name in LAYOUTS}
    return next((name for name, layout in made.items() if layout == partition), None)


def lanes(shape: RingShape) -> Mapping[str, list[list[int]]]:
    """For each layout, of every rank the pairs that one head attends at each step.

    At step s rank r holds the keys of rank r - s (:mod:`sptransform.ops.ring.schedule`).
    """
    return {name: _lanes(shape, getattr(Partition, name)) for name in LAYOUTS}


def _lanes(shape: RingShape, layout: Callable[[int, int], Partition]) -> list[list[int]]:
    queries, keys = (layout(size, shape.num_ranks).owned for size in (shape.queries, shape.keys))
    steps = range(shape.num_ranks)
    return [
        [attended_pairs(own, keys[rank - step], shape.nearest, shape.farthest) for step in steps]
        for rank, own in enumerate(queries)
    ]
