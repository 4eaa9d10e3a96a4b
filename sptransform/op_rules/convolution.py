"""Convolutions: along a dimension that is cut, a rank reads the rows at its borders from its neighbours, the halo."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

import torch

from sptransform.rules.factors import dim_of
from sptransform.rules.rule import OpCall, OpRule, Resize
from sptransform.rules.table import Local, OpEntry
from sptransform.sharding.intervals import Interval, intersection, storage_offsets, united
from sptransform.sharding.partition import Partition
from sptransform.sharding.sizes import Size, SymbolicSizeError

aten = torch.ops.aten


@dataclass(frozen=True)
class _Window:
    """What a convolution reads along one dimension: output ``o`` from ``o * stride - before`` on, ``reach`` rows."""

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
            raise SymbolicSizeError(f"cannot say what a convolution reads of an axis of symbolic size {self.size}")


def _windows(call: OpCall) -> list[_Window]:
    """One for each dimension that the kernel moves along."""
    kernel = call.operand_shapes[1][2:]
    num = len(kernel)
    size, outputs = call.operand_shapes[0][-num:], call.result_shapes[0][-num:]

    def each(name: str) -> list[Any]:
        given = call.argument(name)
        return [given] * num if isinstance(given, int) else [*given] * (num // len(given))

    stride, dilation, padding = each("stride"), each("dilation"), call.argument("padding")
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        pads = [(whole // 2, whole - whole // 2) for whole in total]
    else:
        pads = [(pad, pad) for pad in each("padding")]
    rows = zip(size, outputs, kernel, stride, dilation, pads, strict=True)
    return [_Window(s, o, k, step, d, *pad) for s, o, k, step, d, pad in rows]


def convolution(call: OpCall) -> OpRule | None:
    """Channels are contracted group by group; a dimension that the kernel moves along keeps its axis.

    With a bias the contracted channels stay whole, as in a linear. None for transposed convolutions.
    """
    if call.target is aten.convolution.default and call.argument("transposed"):
        return None
    windows = _windows(call)
    groups = call.argument("groups")
    weight, has_bias = call.operand_shapes[1], call.operand("bias") is not None
    sizes: dict[str, Size] = {"groups": groups, "in": weight[1], "out": weight[0] // groups}
    resize: dict[tuple[str, int, str], Resize] = {}
    replicated: set[str] = set()
    channels, made = (_named(sizes, "groups", name) for name in ("in", "out"))
    batch: tuple[tuple[str, ...], ...] = ()
    if len(call.operand_shapes[0]) == len(windows) + 2:
        sizes["batch"] = call.operand_shapes[0][0]
        batch = (dim_of("batch", sizes["batch"]),)
    rows, kernels, outputs = [], [], []
    for d, window in enumerate(windows):
        name, kernel = f"i{d}", f"k{d}"
        sizes[kernel] = window.kernel
        replicated.add(kernel)
        kernels.append(dim_of(kernel, window.kernel))
        if window.is_blocks:
            sizes[name] = window.outputs
            outputs.append(dim_of(name, window.outputs))
            rows.append((*outputs[-1], *kernels[-1]))
            continue
        sizes[name] = window.size
        rows.append(dim_of(name, window.size))
        if window.is_pointwise:
            outputs.append(rows[-1])
        elif window.size == 1 or window.outputs == 1:
            sizes[f"o{d}"] = window.outputs
            replicated.update({name, f"o{d}"})
            outputs.append(dim_of(f"o{d}", window.outputs))
        else:
            outputs.append(rows[-1])
            resize["operand", 0, name] = Resize(window.read, halo=True)
            resize["result", 0, name] = Resize(window.owned)
    along = frozenset({name for _, _, name in resize}) if len(windows) == 1 else frozenset()
    contracted = {"reduce": frozenset({"in"}), "linear": (frozenset({0}), frozenset({1}))}
    if has_bias:
        replicated.add("in")
        contracted = {}
    operands = [(*batch, channels, *rows), (made, dim_of("in", weight[1]), *kernels), (made,)]
    present = {f for dims in operands[: 2 + has_bias] for names in dims for f in names}
    present |= {f for names in outputs for f in names}
    if "reduce" in contracted:
        contracted["reduce"] &= present
    return OpRule(
        tuple(operands[: 2 + has_bias]),
        ((*batch, made, *outputs),),
        {name: size for name, size in sizes.items() if name in present},
        replicated=frozenset(replicated & present),
        resize=resize,
        ordered=along,
        heavy=True,
        **contracted,
    )


def _named(sizes: dict[str, Size], *names: str) -> tuple[str, ...]:
    return tuple(name for name in names if sizes[name] != 1)


def _convolution_local(call: OpCall, local: Local) -> Any:
    """The padding is that at this rank's borders; each interval of outputs is a convolution of its own rows."""
    factor = local.decision.factor
    is_halo = any(name == factor for _, _, name in local.rule.resize)
    # outputs without rows may read padding alone
    if 0 in local.result_shapes[0] or (0 in local.operand_shapes[0] and not is_halo):
        return _nothing(local)
    if factor == "groups":
        return local.run(call, groups=local.operand_shapes[0][-1 - len(_windows(call))] // call.operand_shapes[1][1])
    if not is_halo:
        return local.run(call)
    at = int(factor.removeprefix("i"))
    windows = _windows(call)
    dim = len(call.operand_shapes[0]) - len(windows) + at
    window, partition = windows[at], local.decision.partition
    stored = window.read(partition).owned[local.rank]
    found = []
    for outputs in window.owned(partition).owned[local.rank]:
        lo, hi = window.rows(outputs)
        x = local.operands[0]
        ((first, last),) = storage_offsets(stored, ((lo, hi),)) if lo < hi else ((0, 0),)
        if (first, last) != (0, local.operand_shapes[0][dim]):
            x = local.emit(aten.slice.Tensor, (x, dim, first, last), {})
        pads = [(w.before, w.after) for w in windows]
        pads[at] = window.padding(outputs)
        even = [before if before == after else 0 for before, after in pads]
        flat = [n for pair, both in zip(pads[::-1], even[::-1], strict=True) for n in ((0, 0) if both else pair)]
        if any(flat):
            x = local.emit(aten.constant_pad_nd.default, (x, flat), {})
        found.append(_run(call, local, x, even))
    return found[0] if len(found) == 1 else local.emit(aten.cat.default, (found, dim), {})


_PLAIN = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}


def _run(call: OpCall, local: Local, x: Any, padding: list[int]) -> Any:
    args, kwargs = local.arguments(call, padding=padding)
    return local.emit(_PLAIN.get(call.target, call.target), (x, *args[1:]), kwargs)


def _nothing(local: Local) -> Any:
    """An empty result, or zeros of no channels, which depends on all operands so that their gradients are sent."""
    dtype = local.result_dtypes[0]
    sums = [local.emit(aten.to.dtype, (local.emit(aten.sum.default, (x,), {}), dtype), {}) for x in local.operands]
    total = sums[0]
    for term in sums[1:]:
        total = local.emit(aten.add.Tensor, (total, term), {})
    if prod(local.result_shapes[0]):
        total = local.emit(aten.mul.Scalar, (total, 0), {})
    return local.emit(aten.expand.default, (total, list(local.result_shapes[0])), {})


_CONVOLUTION = OpEntry(convolution, _convolution_local)

TABLE: list[tuple[Any, OpEntry]] = [
    (aten.conv1d.default, _CONVOLUTION),
    (aten.conv1d.padding, _CONVOLUTION),
    (aten.conv2d.default, _CONVOLUTION),
    (aten.conv2d.padding, _CONVOLUTION),
    (aten.conv3d.default, _CONVOLUTION),
    (aten.conv3d.padding, _CONVOLUTION),
    (aten.convolution.default, _CONVOLUTION),
]
