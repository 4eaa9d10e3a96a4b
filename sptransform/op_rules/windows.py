"""Ops that move a window along dimensions: what a window reads, and how an op runs on the rows of one rank.

Along a dimension that is cut, a rank reads the rows at its borders from its neighbours, the halo.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import prod
from typing import Any

import torch

from sptransform.rules.factors import dim_of
from sptransform.rules.rule import OpCall, Resize
from sptransform.rules.table import Local
from sptransform.sharding.intervals import Interval, intersection, storage_offsets, united
from sptransform.sharding.partition import Partition
from sptransform.sharding.sizes import Size, SymbolicSizeError

aten = torch.ops.aten


@dataclass(frozen=True)
class Window:
    """What an op reads along one dimension: output ``o`` from ``o * stride - before`` on, ``reach`` rows."""

    size: Size
    outputs: Size
    kernel: int
    stride: int
    dilation: int
    before: int
    after: int

    @property
    def reach(self) -> int:
        return self.dilation * (self.kernel - 1) + 1

    @property
    def is_pointwise(self) -> bool:
        """An output reads the row of its own index."""
        return self.kernel == self.stride == 1 and not self.before and not self.after

    @property
    def is_blocks(self) -> bool:
        """Outputs read blocks of rows, which do not overlap."""
        whole = isinstance(self.size, int) and self.size % self.kernel == 0
        return whole and self.kernel == self.stride == self.reach and not self.before and not self.after

    def owned(self, rows: Partition) -> Partition:
        """Who computes which outputs where ``rows`` says who has which rows.

        Outputs keep the index of their row. Where there are fewer, the last are kept together: padding in front, as
        causal convolutions have it, belongs to the first row. More outputs belong to the last row.
        """
        self._check_number()
        shift = self.size - self.outputs if self.stride == 1 and self.outputs < self.size else 0

        def first(row: int) -> int:
            at = -((shift - row) // self.stride)
            return self.outputs if row == self.size else min(max(at, 0), self.outputs)

        return Partition.of(self.outputs, ([(first(lo), first(hi)) for lo, hi in own] for own in rows.owned))

    def read(self, rows: Partition) -> Partition:
        """The rows that each rank reads for its outputs. Rows that no output reads stay where they are."""
        read = [list(map(self.rows, own)) for own in self.owned(rows).owned]
        bounds = [0, *(bound for interval in united(chain(*read)) for bound in interval), self.size]
        unread = tuple(zip(bounds[::2], bounds[1::2], strict=True))
        found = (united([*own, *intersection(had, unread)]) for own, had in zip(read, rows.owned, strict=True))
        return Partition.of(self.size, found)

    def rows(self, outputs: Interval) -> Interval:
        """The rows that an interval of outputs reads; the padding is none."""
        first, last = outputs[0] * self.stride - self.before, (outputs[1] - 1) * self.stride - self.before
        return min(max(first, 0), self.size), max(min(last + self.reach, self.size), 0)

    def padding(self, outputs: Interval) -> tuple[int, int]:
        """The padding that an interval of outputs reads, before and after its rows."""
        first, last = outputs[0] * self.stride - self.before, (outputs[1] - 1) * self.stride - self.before
        before = min(max(-first, 0), self.reach + last - first)
        lo, hi = self.rows(outputs)
        return before, last - first + self.reach - before - max(hi - lo, 0)

    def _check_number(self) -> None:
        if not isinstance(self.size, int):
            raise SymbolicSizeError(f"cannot say what is read of an axis of symbolic size {self.size}")


def windows_of(call: OpCall, kernel: Sequence[int]) -> list[Window]:
    """One for each dimension that the kernel moves along, the last ones of the first operand."""
    num = len(kernel)
    size, outputs = call.operand_shapes[0][-num:], call.result_shapes[0][-num:]
    stride, dilation = (_each(call, name, num) for name in ("stride", "dilation"))
    stride = stride or [*kernel]
    padding = call.argument("padding")
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        pads = [(whole // 2, whole - whole // 2) for whole in total]
    else:
        pads = [(pad, pad) for pad in _each(call, "padding", num)]
    rows = zip(size, outputs, kernel, stride, dilation, pads, strict=True)
    return [Window(s, o, k, step, d, *pad) for s, o, k, step, d, pad in rows]


def _each(call: OpCall, name: str, num: int) -> list[int]:
    """The argument ``name`` for each of ``num`` dimensions; 1 where the op has no such argument."""
    if all(argument.name != name for argument in call.target._schema.arguments):
        return [1] * num
    return each(call.argument(name), num)


def each(given: int | Sequence[int], num: int) -> list[int]:
    """A number for each of ``num`` dimensions; torch takes one number for all of them. None of nothing."""
    return [given] * num if isinstance(given, int) else [*given] * (num // max(len(given), 1))


@dataclass
class Along:
    """The factors of the dimensions that windows move along: of the rows, of the kernel, and of the outputs.

    Attributes:
        moved: those along which windows read more than their own row, and there are several rows and outputs.
    """

    windows: list[Window]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    kernels: list[tuple[str, ...]] = field(default_factory=list)
    outputs: list[tuple[str, ...]] = field(default_factory=list)
    sizes: dict[str, Size] = field(default_factory=dict)
    replicated: set[str] = field(default_factory=set)
    resize: dict[tuple[str, int, str], Resize] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for d, window in enumerate(self.windows):
            self._add(d, window)

    def _add(self, d: int, window: Window) -> None:
        name, kernel = f"i{d}", f"k{d}"
        self.sizes[kernel] = window.kernel
        self.replicated.add(kernel)
        self.kernels.append(dim_of(kernel, window.kernel))
        if window.is_blocks:
            self.sizes[name] = window.outputs
            self.outputs.append(dim_of(name, window.outputs))
            self.rows.append((*self.outputs[-1], *self.kernels[-1]))
            return
        self.sizes[name] = window.size
        self.rows.append(dim_of(name, window.size))
        if window.is_pointwise:
            self.outputs.append(self.rows[-1])
        elif window.size == 1 or window.outputs == 1:
            self.sizes[f"o{d}"] = window.outputs
            self.replicated.update({name, f"o{d}"})
            self.outputs.append(dim_of(f"o{d}", window.outputs))
        else:
            self.outputs.append(self.rows[-1])
            self.resize["operand", 0, name] = Resize(window.read, halo=True)
            self.resize["result", 0, name] = Resize(window.owned)

    @property
    def moved(self) -> list[str]:
        return [f"i{d}" for d, w in enumerate(self.windows) if 1 not in (w.size, w.outputs) and not w.is_pointwise]

    @property
    def evidence(self) -> dict[str, frozenset[str]]:
        """What says that a dimension is a sequence, as fields of a rule."""
        return {"ordered" if len(self.windows) == 1 else "windowed": frozenset(self.moved[:1])}


Run = Callable[[Any, list[int]], Any]


def run_on_rows(
    call: OpCall, local: Local, windows: list[Window], run: Run, *, fill: float = 0, rows: Any = None
) -> Any:
    """``run(rows, padding)`` for each interval of this rank's outputs, on those of its rows that it reads.

    Padding is that at the rank's own borders. What is not the same at both ends is added to the rows, of ``fill``.
    """
    rows = local.operands[0] if rows is None else rows
    factor = local.decision.factor
    at = int(factor.removeprefix("i"))
    dim = len(call.operand_shapes[0]) - len(windows) + at
    window, partition = windows[at], local.decision.partition
    stored = window.read(partition).owned[local.rank]
    found = []
    for outputs in window.owned(partition).owned[local.rank]:
        lo, hi = window.rows(outputs)
        x = rows
        ((first, last),) = storage_offsets(stored, ((lo, hi),)) if lo < hi else ((0, 0),)
        if (first, last) != (0, local.operand_shapes[0][dim]):
            x = local.emit(aten.slice.Tensor, (x, dim, first, last), {})
        pads = [(w.before, w.after) for w in windows]
        pads[at] = window.padding(outputs)
        even = [before if before == after else 0 for before, after in pads]
        flat = [n for pair, both in zip(pads[::-1], even[::-1], strict=True) for n in ((0, 0) if both else pair)]
        if any(flat):
            x = local.emit(aten.constant_pad_nd.default, (x, flat, fill), {})
        found.append(run(x, even))
    return found[0] if len(found) == 1 else local.emit(aten.cat.default, (found, dim), {})


def has_halo(local: Local) -> bool:
    """Whether what is cut is a dimension of which ranks read rows of their neighbours."""
    return any(name == local.decision.factor for _, _, name in local.rule.resize)


def is_nothing(local: Local) -> bool:
    """Whether this rank has no result, or no rows; outputs without rows may still read padding."""
    return 0 in local.result_shapes[0] or (0 in local.operand_shapes[0] and not has_halo(local))


def nothing(local: Local) -> Any:
    """An empty result, or zeros of no channels, which depends on all operands so that their gradients are sent."""
    dtype = local.result_dtypes[0]
    sums = [local.emit(aten.to.dtype, (local.emit(aten.sum.default, (x,), {}), dtype), {}) for x in local.operands]
    total = sums[0]
    for term in sums[1:]:
        total = local.emit(aten.add.Tensor, (total, term), {})
    if prod(local.result_shapes[0]):
        total = local.emit(aten.mul.Scalar, (total, 0), {})
    return local.emit(aten.expand.default, (total, list(local.result_shapes[0])), {})
