"""How much attention each rank computes, counted in (query, key) pairs, over packed documents too."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

from sptransform.diagnostics.errors import UsageError, describe
from sptransform.ops.ring.plan import attended_pairs
from sptransform.sharding.intervals import Intervals, intersection
from sptransform.sharding.partition import Partition

Documents = tuple[tuple[int, ...], ...]


@lru_cache(maxsize=4096)
def pairs_seen(queries: Intervals, documents: Intervals, nearest: int | None, farthest: int | None) -> int:
    """The pairs that these queries attend: a query at i sees the keys j of its document, nearest <= i - j <= farthest.

    A query outside of all documents sees nothing.
    """
    found = ((intersection(queries, (document,)), (document,)) for document in documents)
    return sum(attended_pairs(own, keys, nearest, farthest) for own, keys in found)


def pairs_by_rank(
    queries: Partition, documents: Intervals, nearest: int | None = None, farthest: int | None = None
) -> tuple[int, ...]:
    """:func:`pairs_seen` of every rank's queries."""
    return tuple(pairs_seen(own, documents, nearest, farthest) for own in queries.owned)


def imbalance(pairs: Sequence[int]) -> float:
    """By how much the busiest rank exceeds the mean: 0.1 is 10% more; 0 if there is no work."""
    return max(pairs) * len(pairs) / sum(pairs) - 1 if any(pairs) else 0.0


def intervals_of(lengths: Sequence[int]) -> Intervals:
    """The positions of packed documents of these lengths, the first at 0."""
    return tuple(pairwise(accumulate(lengths, initial=0)))


def checked_documents(documents: Any) -> Documents | None:
    """The lengths that a user gave of one packed row, or of several, as one tuple a row.

    Raises:
        UsageError: they are anything else.
    """
    if documents is None:
        return None
    is_list = isinstance(documents, list | tuple) and len(documents) > 0
    rows = documents if is_list and all(isinstance(row, list | tuple) for row in documents) else [documents]
    if not is_list or not all(_are_lengths(row) for row in rows):
        raise UsageError(
            describe(
                "documents are the lengths of the documents in a packed row",
                found=f"documents={documents!r}",
                fix="a list of positive ints, [3000, 5192], or one such list for each row",
            )
        )
    return tuple(map(tuple, rows))


def _are_lengths(row: Sequence[Any]) -> bool:
    return len(row) > 0 and all(isinstance(x, int) and not isinstance(x, bool) and x > 0 for x in row)
