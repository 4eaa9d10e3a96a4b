"""One rank's tensors in a call of ring attention, and what it computes with each block of keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from sptransform.ops.communication.steps import Start
from sptransform.ops.mask_gradients import gradients
from sptransform.ops.mask_program import block_mask, block_operands, parse
from sptransform.ops.ring.blocks import lay_out, positions, repeats_heads, scale_of
from sptransform.ops.ring.data_plan import DataPlan
from sptransform.ops.ring.joined import Joined, groups_of
from sptransform.ops.ring.kernels.interface import Case, compute_dtype
from sptransform.ops.ring.kernels.table import choose, has_windows, varlen_of
from sptransform.ops.ring.messages import unpack
from sptransform.ops.ring.plan import Call, Tile, plan_calls
from sptransform.sharding.intervals import Intervals
from sptransform.sharding.partition import Partition

_sp = torch.ops.sptransform


def _partition_of(text: str, part: Tensor) -> Partition | None:
    """The partition of dim 2 that ``text`` spells out, given a rank's ``part`` [B, H, s, D]; None for empty text."""
    return Partition.parse(text, part=part.shape[2]) if text else None


def of_batch(x: Tensor, rows: tuple[int, int] | None) -> Tensor:
    """Some rows of the batch of x [B or 1, ..]; None for all."""
    return x if rows is None or x.shape[0] == 1 else x[rows[0] : rows[1]]


class RankView:
    """One rank's arguments of ``ring_attention``; block j is the keys and values of rank j.

    Raises:
        ValueError: the dtypes differ, or the number of queries or keys is not what the rank owns.
    """

    def __init__(
        self,
        rank: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rows: Sequence[Tensor],
        columns: Sequence[Tensor],
        seed: Tensor,
        tables: Sequence[Tensor] | None = None,
        *,
        mask: str = "",
        nearest: int | None = None,
        farthest: int | None = None,
        dropout_p: float = 0.0,
        scale: float | None = None,
        softcap: float = 0.0,
        key_head_of: Sequence[int] = (),
        explicit: bool = False,
        queries: str = "",
        keys: str = "",
        group_name: str = "",
        trained: Sequence[int] = (),
        reads_data: bool = True,
    ) -> None:
        if not query.dtype == key.dtype == value.dtype:
            raise ValueError(f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}, not of one dtype")
        # kernels may give results the layout of the queries: converted here once, not once per block
        self.query = lay_out(query, query.dtype)
        self.rank, self.key, self.value = rank, key, value
        self.rows, self.columns, self.tables, self.program = rows, columns, tables or [], mask
        self.operands, self.trained = [*rows, *columns, *self.tables], trained
        self.limits = nearest, farthest
        self.options = {"scale": scale, "softcap": softcap, "key_head_of": list(key_head_of)}
        if dropout_p > 0:
            self.options |= {"dropout_p": dropout_p, "seed": seed}
        case = Case.of(query, value, masked=False, explicit=dropout_p > 0, softcap=softcap)
        self.windows = has_windows(case)
        is_repeated = self._is_empty() or repeats_heads(query, key, key_head_of, choose(case))
        self._varlen = None if is_repeated else varlen_of(case)
        self.partition = _partition_of(keys, key)
        self.num_ranks = self.partition.num_ranks if self.partition else 1
        # without a program a row's keys may be spread over several calls
        self.options["explicit"] = explicit and bool(mask) and self.partition is None
        self.own = self.block_at(0)
        self.positions = _owned(_partition_of(queries, query), rank, query.shape[2], "queries")
        _owned(self.partition, self.own, key.shape[2], "keys")
        # probabilities that are computed again need all keys of a row in one call
        self._data_plan = self._planned_by_data() if reads_data and mask and not self.options["explicit"] else None
        self._plans: dict[int, tuple[Call, ...]] = {}
        self._joined: dict[int, list[Joined]] = {}

    def block_at(self, step: int) -> int:
        """The block that this rank holds at a step."""
        return (self.rank - step) % self.num_ranks

    def keys_of(self, block: int) -> Intervals:
        return self.partition.owned[block] if self.partition else ((0, self.key.shape[2]),)

    def _shapes_of(self, block: int) -> list[tuple[int, ...]]:
        size = sum(hi - lo for lo, hi in self.keys_of(block))
        return [(*x.shape[:2], size, x.shape[3]) for x in (self.key, self.value)]

    def numel_of(self, block: int) -> int:
        """The number of entries in a message with the keys and values of a block."""
        return sum(map(prod, self._shapes_of(block)))

    def pack(self) -> Tensor:
        """This rank's keys and values as one message."""
        return _sp.pack_block(self.key, self.value)

    def unpack(self, message: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """The keys and values of a block, or their gradients, as views of a message."""
        return unpack(message, *self._shapes_of(block))

    def hop(self, message: Tensor, coming: int) -> Start:
        """Send ``message`` to the next rank, and receive block ``coming`` or its gradients from the previous one."""
        sent, received = [0] * self.num_ranks, [0] * self.num_ranks
        sent[(self.rank + 1) % self.num_ranks] = message.numel()
        received[(self.rank - 1) % self.num_ranks] = self.numel_of(coming)
        return Start(message, sent, received)

    def plan(self, block: int) -> tuple[Call, ...]:
        if block not in self._plans:
            self._plans[block] = self._planned(self.keys_of(block))
        return self._plans[block]

    def _planned(self, keys: Intervals) -> tuple[Call, ...]:
        if self._is_empty():
            return ()  # some kernels end the process on empty input
        by_data = None if self._data_plan is None else self._data_plan.calls(keys)
        if by_data is not None:
            return by_data
        masked = bool(self.program)
        return plan_calls(self.positions, keys, *self.limits, masked=masked, windows=self.windows, tile=self._tile)

    def _is_empty(self) -> bool:
        return 0 in (*self.query.shape, *self.key.shape[:2], self.value.shape[3])

    def _planned_by_data(self) -> DataPlan | None:
        query = self.query
        # a CUDA graph runs for other data too
        if self._is_empty() or (query.is_cuda and torch.cuda.is_current_stream_capturing()):
            return None
        own = positions([bound for interval in self.positions for bound in interval], query.device)
        num_keys = self.partition.size if self.partition else self.key.shape[2]
        operands = self.rows, self.columns, self.tables
        small = None if self._varlen is None else 0
        found = DataPlan.of(self.program, operands, own, num_keys, self.limits, self.windows, self._tile, small)
        # gradients of what is added to scores are taken for the whole batch at once; with dropout the forward, which
        # does not know what is trained, has to make the calls of the backward
        is_for_batch = self.trained or ("seed" in self.options and self._is_added)
        return None if found is not None and found.is_batched and is_for_batch else found

    @cached_property
    def _tile(self) -> Tile:
        return Tile.of(*self.query.shape[2:], whole_rows=self._has_whole_rows)

    @cached_property
    def _has_whole_rows(self) -> bool:
        """Whether a call has all keys of its rows, as one device has.

        A number that is added may hide all keys of a row. If it is large, ``lse`` loses the digits that merging needs.
        """
        if not self.program or self.partition is not None:
            return False
        return self.options["explicit"] or self._is_added

    @cached_property
    def _is_added(self) -> bool:
        """Whether the program's numbers are added to scores."""
        return block_mask(self.program, self.rows, self.columns, 0, 1, slice(0, 1), self.tables).is_floating_point()

    def reach(self, block: int) -> tuple[int, int]:
        """The range (first, stop) of a block's keys that this rank's calls use."""
        calls = self.plan(block)
        return min((call.k_start for call in calls), default=0), max((call.k_stop for call in calls), default=0)

    def calls(self, block: int) -> Iterator[tuple[Call, dict[str, Any]]]:
        """The calls of this rank's queries on a block, each with the options of the block ops.

        Without those that are :meth:`joined`.
        """
        apart = {call for group in self.joined(block) for call in group.calls}
        for index, call in enumerate(self.plan(block)):
            if call in apart:
                continue
            options = self.options
            if "seed" in options:
                # distinct for every block that any rank computes
                options = {**options, "stream": ((self.rank * self.num_ranks + block) << 20) + index}
            if call.sliding:
                options = {**options, "sliding": True}
            if self._data_plan is not None:
                options = {**options, "varying": True}
            yield call, options

    def joined(self, block: int) -> list[Joined]:
        """The calls that are computed together, if the kernel takes pieces of sequences."""
        if self._data_plan is None or self._varlen is None:
            return []
        if block not in self._joined:
            softcap, (batch, _, num_queries, _) = self.options["softcap"], self.query.shape
            num_keys = sum(hi - lo for lo, hi in self.keys_of(block))
            options = {"scale": scale_of(self.query, self.options["scale"])} | ({"softcap": softcap} if softcap else {})
            self._joined[block] = [
                Joined(self._varlen, calls, (batch, num_queries, num_keys), options)
                for calls in groups_of(self.plan(block), batch, num_keys)
            ]
        return self._joined[block]

    def no_operand_gradients(self) -> list[Tensor]:
        """Zeros for the gradients of the program's trained operands, of two dimensions or more."""
        dtype = compute_dtype(self.query.dtype)
        return [torch.atleast_2d(self.operands[i].new_zeros(self.operands[i].shape, dtype=dtype)) for i in self.trained]

    def operand_gradients(self, call: Call, block: int, grad_mask: Tensor) -> Iterator[tuple[Tensor, int, list[int]]]:
        """What a call adds to the gradient of each trained operand, its first row there, and the bounds of columns.

        ``grad_mask`` is the gradient of the call's mask.
        """
        keys = _bounds(self.keys_of(block), call.k_start, call.k_stop)
        read = block_operands(
            self.rows, self.columns, self.tables, call.q_start, call.q_stop, self._key_positions(keys)
        )
        found = gradients(parse(self.program), read, self.trained, grad_mask)
        for i, part in zip(self.trained, found, strict=True):
            part, whole = torch.atleast_2d(part), torch.atleast_2d(self.operands[i])
            is_row, is_table = i < len(self.rows), i >= len(self.rows) + len(self.columns)
            start = call.q_start if is_row and whole.shape[-2] != 1 else 0
            yield part, start, [0, whole.shape[-1]] if is_table or whole.shape[-1] == 1 else keys

    def _key_positions(self, bounds: list[int]) -> Tensor | slice:
        return slice(*bounds) if len(bounds) == 2 else positions(bounds, self.query.device)

    def mask(self, call: Call, block: int) -> Tensor | None:
        """What hides keys of the block from the queries of a call; see :func:`block_mask`."""
        keys = _bounds(self.keys_of(block), call.k_start, call.k_stop)
        band = None
        if call.kind == "band" and self.limits != (None, None):
            band = _sp.band_mask(self.query, _bounds(self.positions, call.q_start, call.q_stop), keys, *self.limits)
        if not self.program or call.decided:
            return band
        at = self._key_positions(keys)
        sides = self.rows, self.columns
        rows, columns = ([x if x.dim() < 4 else of_batch(x, call.batch) for x in xs] for xs in sides)
        mask = block_mask(self.program, rows, columns, call.q_start, call.q_stop, at, self.tables)
        if band is None:
            return mask
        return mask & band if mask.dtype == torch.bool else mask.masked_fill(~band, -torch.inf)


def _owned(partition: Partition | None, rank: int, size: int, what: str) -> Intervals:
    if partition is None:
        return ((0, size),) if size else ()
    if partition.local_size(rank) != size:
        raise ValueError(f"rank {rank} has {size} {what}, and owns {partition.local_size(rank)} in {partition}")
    return partition.owned[rank]


def _bounds(intervals: Intervals, start: int, stop: int) -> list[int]:
    """Bounds ``lo, hi, lo, hi ..`` of the positions stored at ``start .. stop - 1``."""
    bounds, at = [], 0
    for lo, hi in intervals:
        first, last = max(start, at), min(stop, at + hi - lo)
        if first < last:
            bounds += [lo + first - at, lo + last - at]
        at += hi - lo
    return bounds
