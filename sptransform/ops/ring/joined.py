"""Calls of a plan that one call of a kernel computes: the pieces of packed documents, for kernels that take pieces."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sptransform.ops.ring.kernels.interface import Pieces, Varlen
from sptransform.ops.ring.plan import Call

# the range of sequences, None for all; the first row; tensors [B, H, rows, ..]
Part = tuple[tuple[int, int] | None, int, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Joined:
    """Full calls, or causal ones, of which no two have the same rows.

    Args:
        kernel: what computes them.
        calls: two or more, decided.
        sizes: numbers of sequences, of queries and of keys.
        options: ``scale``, and ``softcap`` if there is one.
    """

    kernel: Varlen
    calls: tuple[Call, ...]
    sizes: tuple[int, int, int]
    options: dict[str, Any]

    def results(self, query: Tensor, key: Tensor, value: Tensor) -> Iterator[Part]:
        """out [1, H, .., E] and lse [1, H, ..] of queries."""
        out, lse = self.kernel.forward(query, key, value, self._queries, self._keys, self._causal, **self.options)
        for row, start, own in _places(self._queries, self.sizes[1]):
            yield (row, row + 1), start, (_rows(out, own), lse[None, :, own].to(torch.float64))

    def gradients(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[list[Part], list[Part]]:
        """The gradients of queries; and of keys and of values."""
        xs = grad, query, key, value, out, lse
        of_query, *of_keys = self.kernel.backward(*xs, self._queries, self._keys, self._causal, **self.options)
        places = _places(self._queries, self.sizes[1]), _places(self._keys, self.sizes[2])
        of_queries = [((row, row + 1), start, (_rows(of_query, own),)) for row, start, own in places[0]]
        return of_queries, [
            ((row, row + 1), start, tuple(_rows(x, own) for x in of_keys)) for row, start, own in places[1]
        ]

    @property
    def _causal(self) -> bool:
        return self.calls[0].kind == "causal"

    @cached_property
    def _queries(self) -> Pieces:
        return self._pieces([(call.q_start, call.q_stop) for call in self.calls], self.sizes[1])

    @cached_property
    def _keys(self) -> Pieces:
        return self._pieces([(call.k_start, call.k_stop) for call in self.calls], self.sizes[2])

    def _pieces(self, ranges: Sequence[tuple[int, int]], size: int) -> Pieces:
        """The ranges of each sequence, numbered through all sequences of ``size`` rows."""
        found = []
        for call, (start, stop) in zip(self.calls, ranges, strict=True):
            first, last = call.batch or (0, self.sizes[0])
            found += [(row * size + start, row * size + stop) for row in range(first, last)]
        return found


def groups_of(calls: Sequence[Call], batch: int, num_keys: int) -> list[tuple[Call, ...]]:
    """Calls that one kernel call can compute: two or more of one kind, without a mask, that share no rows.

    A kernel gets a copy of the keys of each call, so those of a group are no more than there are.
    """
    groups: dict[str, list[list[Call]]] = defaultdict(list)
    room: dict[str, int] = {}
    for call in calls:
        if not call.decided or call.sliding:
            continue
        of_kind, (first, last) = groups[call.kind], call.batch or (0, batch)
        size = (call.k_stop - call.k_start) * (last - first)
        if of_kind and _is_after(call, of_kind[-1][-1]) and size <= room[call.kind]:
            of_kind[-1].append(call)
        else:
            of_kind.append([call])
            room[call.kind] = batch * num_keys
        room[call.kind] -= size
    return [tuple(group) for of_kind in groups.values() for group in of_kind if len(group) > 1]


def _is_after(call: Call, other: Call) -> bool:
    """Whether a call of the plan after ``other``, which is ordered by rows, has no row of it."""
    return call.batch != other.batch or call.q_start >= other.q_stop


def _rows(x: Tensor, own: slice) -> Tensor:
    """Rows of x [n, H, D] as [1, H, .., D]."""
    return x[own].transpose(0, 1)[None]


def _places(pieces: Pieces, size: int) -> Iterator[tuple[int, int, slice]]:
    """(sequence, first row, rows of results): where results belong, those of pieces that adjoin as one."""
    first = at = 0
    begin, end = pieces[0][0], pieces[0][0]
    for start, stop in pieces:
        if start != end or (start % size == 0 and at):
            yield begin // size, begin % size, slice(first, at)
            begin, first = start, at
        at += stop - start
        end = stop
    yield begin // size, begin % size, slice(first, at)
