"""Half-open intervals of indices, and tuples of them."""

from __future__ import annotations

from collections.abc import Iterable

from sptransform.sharding.sizes import Size

Interval = tuple[Size, Size]
Intervals = tuple[Interval, ...]


def adjoined(intervals: Iterable[Interval]) -> Intervals:
    """Drop empty intervals and join those that touch, keeping the order of the owner's storage."""
    merged: list[Interval] = []
    for lo, hi in intervals:
        if lo >= hi:
            continue
        if merged and merged[-1][1] == lo:
            merged[-1] = (merged[-1][0], hi)
        else:
            merged.append((lo, hi))
    return tuple(merged)


def united(intervals: Iterable[Interval]) -> Intervals:
    """The union of intervals that may overlap, ascending."""
    found: list[Interval] = []
    for lo, hi in sorted(interval for interval in intervals if interval[0] < interval[1]):
        if found and lo <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], hi))
        else:
            found.append((lo, hi))
    return tuple(found)


def intersection(one: Intervals, other: Intervals) -> Intervals:
    """The intersection, ascending. Each piece lies within one interval of ``one`` and one of ``other``."""
    pieces = ((max(a, c), min(b, d)) for a, b in one for c, d in other)
    return tuple(sorted((lo, hi) for lo, hi in pieces if lo < hi))


def storage_offsets(own: Intervals, part: Intervals) -> Intervals:
    """Storage offsets of ``part`` on a rank that owns ``own``."""
    places = []
    for lo, hi in part:
        before = 0
        for start, stop in own:
            if start <= lo < stop:
                places.append((before + lo - start, before + hi - start))
            before += stop - start
    return tuple(places)
