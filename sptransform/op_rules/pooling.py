"""Pools: the largest entry, or the mean, of what a window reads."""

from __future__ import annotations

from math import inf, prod
from typing import Any

import torch

from sptransform.op_rules.windows import (
    Along,
    Window,
    each,
    has_halo,
    is_nothing,
    nothing,
    run_on_rows,
    windows_of,
)
from sptransform.rules.factors import dim_of
from sptransform.rules.rule import OpCall, OpRule
from sptransform.rules.table import Local, OpEntry
from sptransform.sharding.sizes import Size

aten = torch.ops.aten


_NUM_DIMS = {
    aten.avg_pool2d.default: 2,
    aten.avg_pool3d.default: 3,
    aten.max_pool1d.default: 1,
    aten.max_pool2d.default: 2,
    aten.max_pool3d.default: 3,
}


def _windows(call: OpCall) -> list[Window]:
    return windows_of(call, each(call.argument("kernel_size"), _NUM_DIMS[call.target]))


def pool(call: OpCall) -> OpRule:
    """A dimension that the window moves along keeps its axis, the others pass.

    Of means that count padding, windows beyond it (``ceil_mode``) count less: there the dimensions stay whole.
    """
    along = Along(_windows(call))
    num = len(along.windows)
    leading = call.operand_shapes[0][:-num]
    lead = tuple(dim_of(f"d{at}", size) for at, size in enumerate(leading))
    sizes = along.sizes | {f"d{at}": size for at, size in enumerate(leading)}
    operand, result = (*lead, *along.rows), (*lead, *along.outputs)
    present = {f for dims in (operand, result) for names in dims for f in names}
    replicated = {*along.replicated}
    if call.target in _MEANS and _counts_padding(call) and any(map(_reads_beyond, along.windows)):
        replicated.update(f"i{d}" for d in range(num))
    return OpRule(
        (operand,),
        (result,),
        {name: size for name, size in sizes.items() if name in present},
        replicated=frozenset(replicated & present),
        resize=along.resize,
        **along.evidence,
    )


def _reads_beyond(window: Window) -> bool:
    """Whether the last window goes beyond the padding."""
    return (window.outputs - 1) * window.stride + window.reach > window.before + window.size + window.after


def _counts_padding(call: OpCall) -> bool:
    """Whether a mean divides by the number of all entries of a window, those of the padding included."""
    return call.argument("count_include_pad") and call.argument("divisor_override") is None


def _max_local(call: OpCall, local: Local) -> Any:
    if is_nothing(local):
        return nothing(local)
    if not has_halo(local):
        return local.run(call)

    def run(x: Any, padding: list[int]) -> Any:
        args, kwargs = local.arguments(call, padding=padding)
        return local.emit(call.target, (x, *args[1:]), kwargs)

    return run_on_rows(call, local, _windows(call), run, fill=-inf)


def _mean_local(call: OpCall, local: Local) -> Any:
    """Padding that this rank adds to its rows is no padding to the op: the divisor is given."""
    if is_nothing(local):
        return nothing(local)
    if not has_halo(local):
        return local.run(call)
    windows = _windows(call)
    divisor = call.argument("divisor_override")
    are_partial = any(w.before or w.after or _reads_beyond(w) for w in windows)
    counts = divisor is None and not call.argument("count_include_pad") and are_partial

    def summed(x: Any, padding: list[int], divisor: int) -> Any:
        args, kwargs = local.arguments(call, padding=padding, divisor_override=divisor)
        return local.emit(call.target, (x, *args[1:]), kwargs)

    total = run_on_rows(
        call,
        local,
        windows,
        lambda x, padding: summed(x, padding, 1 if counts else divisor or prod(w.kernel for w in windows)),
    )
    if not counts:
        return total
    shape = local.operand_shapes[0]
    ones = [1] * (len(shape) - len(windows)) + list(shape[len(shape) - len(windows) :])
    ones = local.emit(aten.new_ones.default, (local.operands[0], ones), {})
    found = run_on_rows(call, local, windows, lambda x, padding: summed(x, padding, 1), rows=ones)
    return local.emit(aten.div.Tensor, (total, found), {})


def adaptive(call: OpCall) -> OpRule:
    """Means of as many blocks as are asked for. Of one block ranks add up theirs; sizes that blocks do not divide stay
    whole.
    """
    shape, target = call.operand_shapes[0], call.result_shapes[0]
    num = len(call.argument("output_size"))
    sizes: dict[str, Size] = {}
    operand, result, replicated, summed = [], [], set(), set()
    for dim, (size, outputs) in enumerate(zip(shape, target, strict=True)):
        own, block = f"i{dim}", f"k{dim}"
        sizes[own], inner = outputs, ()
        if dim >= len(shape) - num and size != outputs:
            divides = isinstance(size, int) and size % outputs == 0
            sizes[block] = size // outputs if divides else size
            inner = (block,)
            (summed if outputs == 1 else replicated).add(block)
            if not divides and outputs != 1:
                replicated.add(own)
        is_whole = own in replicated
        operand.append(inner if is_whole else (*dim_of(own, outputs), *inner))
        result.append(dim_of(own, outputs))
    present = {f for dims in (operand, result) for names in dims for f in names}
    return OpRule(
        (tuple(operand),),
        (tuple(result),),
        {name: size for name, size in sizes.items() if name in present},
        reduce=frozenset(summed),
        replicated=frozenset(replicated & present),
        linear=(frozenset({0}),),
    )


def _adaptive_local(call: OpCall, local: Local) -> Any:
    """The mean of this rank's rows is a part of the mean of all, by how many they are."""
    if is_nothing(local):
        return nothing(local)
    asked = list(local.result_shapes[0][-len(call.argument("output_size")) :])
    found = local.run(call, output_size=asked)
    if local.decision.factor not in local.rule.reduce:
        return found
    share = local.decision.partition.local_size(local.rank) / local.decision.partition.size
    return local.emit(aten.mul.Scalar, (found, share), {})


_ADAPTIVE = OpEntry(adaptive, _adaptive_local)
_MAX = OpEntry(pool, _max_local)
_MEAN = OpEntry(pool, _mean_local)
_MEANS = {aten.avg_pool2d.default, aten.avg_pool3d.default}

TABLE: list[tuple[Any, OpEntry]] = [
    (aten._adaptive_avg_pool2d.default, _ADAPTIVE),
    (aten._adaptive_avg_pool3d.default, _ADAPTIVE),
    (aten.adaptive_avg_pool1d.default, _ADAPTIVE),
    (aten.adaptive_avg_pool2d.default, _ADAPTIVE),
    (aten.adaptive_avg_pool3d.default, _ADAPTIVE),
    (aten.avg_pool2d.default, _MEAN),
    (aten.avg_pool3d.default, _MEAN),
    (aten.max_pool1d.default, _MAX),
    (aten.max_pool2d.default, _MAX),
    (aten.max_pool3d.default, _MAX),
]
