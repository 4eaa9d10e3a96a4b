"""Tokens cut into segments, along which what a mask compares is constant or goes on by one.

Documents packed into a sequence are the usual case: a segment is a document, or the part of one that a rank has.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sptransform.sharding.intervals import Intervals


@dataclass(frozen=True)
class Segment:
    """Tokens ``start .. stop - 1``.

    Args:
        labels: what has to be equal, for all of them.
        firsts: what is subtracted, for the first of them; for every next one it is one more.
    """

    start: int
    stop: int
    labels: tuple[int, ...]
    firsts: tuple[int, ...]


def segments(
    labels: Sequence[Tensor], subtracted: Sequence[Tensor], shown: Sequence[Tensor], size: int
) -> list[list[Segment]]:
    """The segments of ``size`` tokens, ascending, for every row of the batch or for all at once.

    Args:
        labels, subtracted: integers [batch or 1, size or 1].
        shown: booleans of these shapes; tokens for which one of them is false are in no segment.
    """
    values = [x.to(torch.int64) for x in (*labels, *subtracted, *shown)]
    batch = max((x.shape[0] for x in values), default=1)
    if size == 0:
        return [[] for _ in range(batch)]
    if not values:
        return [[Segment(0, size, (), ())]]
    device = values[0].device
    stacked = torch.stack([x.expand(batch, size) for x in values])
    # what goes on by one is constant once the number of the token is taken off
    moving = torch.arange(size, device=device)
    first, last = len(labels), len(labels) + len(subtracted)
    subtracted = stacked[first:last]
    begins = (subtracted == torch.iinfo(torch.int64).min).any(0)  # it is not one more than the largest number
    subtracted -= moving
    begins[:, :1] = True
    begins[:, 1:] |= (stacked[..., 1:] != stacked[..., :-1]).any(0)
    subtracted += moving
    rows, starts = begins.nonzero(as_tuple=True)
    # one copy to the host
    table = torch.cat([rows[None], starts[None], stacked[:, rows, starts]]).tolist()
    found: list[list[Segment]] = [[] for _ in range(batch)]
    at = list(zip(*table, strict=True))
    for (row, start, *numbers), after in zip(at, [*at[1:], None], strict=True):
        stop = after[1] if after is not None and after[0] == row else size
        if all(numbers[last:]):
            found[row].append(Segment(start, stop, tuple(numbers[:first]), tuple(numbers[first:last])))
    return found


def stored(found: Sequence[Segment], owned: Intervals) -> list[Segment]:
    """Segments of all tokens as those of a rank that stores the intervals ``owned``, numbered as it stores them."""
    parts, at = [], 0
    for lo, hi in owned:
        for segment in found[bisect_right(found, lo, key=lambda x: x.stop) :]:
            if segment.start >= hi:
                break
            start, stop = max(segment.start, lo), min(segment.stop, hi)
            firsts = tuple(first + start - segment.start for first in segment.firsts)
            parts.append(Segment(start - lo + at, stop - lo + at, segment.labels, firsts))
        at += hi - lo
    return parts
