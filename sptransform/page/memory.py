"""Memory over a step, as a curve that fits a picture: the highest of each stretch, and its spikes by name."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from sptransform.cost.records import Step, Work

POINTS = 180
SPIKES = 3


@dataclass(frozen=True)
class Spike:
    """A local maximum: the work that holds ``live`` bytes, and where it stands in the curve."""

    work: Work
    live: int
    point: int


@dataclass(frozen=True)
class Curve:
    """Bytes held over a step.

    Attributes:
        points: the most that is held in each of equal stretches of ops.
        works: the op at which that is.
        floor: parameters and inputs, which are always held.
        backward: the first point of the backward.
        spikes: the peak, then lower ones elsewhere in the step, of other ops.
    """

    points: tuple[int, ...]
    works: tuple[Work, ...]
    floor: int
    backward: int
    spikes: tuple[Spike, ...]


def curve(step: Step, size: int = POINTS) -> Curve:
    works = list(step.unrolled())
    live = list(step.live_bytes())
    size = min(size, len(works))
    bounds = [len(works) * i // size for i in range(size + 1)] if works else [0]
    highest = [max(range(lo, hi), key=live.__getitem__) for lo, hi in itertools.pairwise(bounds)]
    points = tuple(live[at] for at in highest)
    first = next((i for i, at in enumerate(highest) if works[at].direction == "backward"), len(highest))
    chosen = tuple(works[at] for at in highest)
    return Curve(points, chosen, step.parameters + step.inputs, first, tuple(_spikes(points, chosen)))


def _spikes(points: Sequence[int], works: Sequence[Work]) -> list[Spike]:
    """The highest points that stand out from what is around them, each of another op."""
    near = max(len(points) // 24, 1)
    order = sorted(range(len(points)), key=lambda at: (-points[at], at))
    found: list[Spike] = []
    for at in order:
        around = points[max(at - near, 0) : at + near + 1]
        is_other = all(
            abs(at - spike.point) > 2 * near
            and (works[at].op, works[at].source_line) != (spike.work.op, spike.work.source_line)
            for spike in found
        )
        if points[at] == max(around) and is_other:
            found.append(Spike(works[at], points[at], at))
        if len(found) == SPIKES:
            break
    return found
