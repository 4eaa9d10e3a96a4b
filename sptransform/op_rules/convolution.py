"""Convolutions: ``conv1d`` and the like are opened to this one op."""

from __future__ import annotations

from typing import Any

import torch

from sptransform.rules.factors import dim_of
from sptransform.rules.rule import OpCall, OpRule, RuleFn
from sptransform.rules.table import Local, OpEntry

aten = torch.ops.aten


def convolution(call: OpCall) -> OpRule | None:
    """A convolution whose windows share nothing: a product with every patch, ``[n, c, (i k)] -> [n, o, i]``.

    Channels stay whole, since a bias would be added by every rank, and groups have channels of their own. None where
    windows overlap, or leave a rest; for transposed convolutions, and where a batch of one is left out.
    """
    x, weight, result = call.operand_shapes[0], call.operand_shapes[1], call.result_shapes[0]
    if call.argument("transposed") or len(x) != len(weight):
        return None
    batch, channels = dim_of("n", x[0]), dim_of("o", weight[0])
    sizes = {"n": x[0], "c": x[1], "w": weight[1], "o": weight[0]}
    operand, kernel, out = [batch, dim_of("c", x[1])], [channels, dim_of("w", weight[1])], [batch, channels]
    settings = zip(*(call.argument(name) for name in ("stride", "padding", "dilation")), strict=True)
    for d, (setting, source, width, target) in enumerate(zip(settings, x[2:], weight[2:], result[2:], strict=True)):
        if setting != (width, 0, 1) or source != target * width:
            return None
        sizes |= {f"i{d}": target, f"k{d}": width}
        operand.append((*dim_of(f"i{d}", target), *dim_of(f"k{d}", width)))
        kernel.append(dim_of(f"k{d}", width))
        out.append(dim_of(f"i{d}", target))
    operands = [tuple(operand), tuple(kernel), *([(channels,)] if len(call.operand_shapes) == 3 else [])]
    whole = frozenset(name for name in sizes if name[0] in "cwok")
    return OpRule(tuple(operands), (tuple(out),), sizes, replicated=whole, heavy=True)


def _convolution_local(call: OpCall, local: Local) -> Any:
    """A rank without windows takes one of zeros, and drops it: there is no convolution of nothing."""
    shape, kernel = local.operand_shapes[0], local.operand_shapes[1]
    empty = [d for d in range(2, len(shape)) if shape[d] == 0]
    if not empty:
        return local.run(call)
    args, kwargs = local.arguments(call)
    pads = [n for d in reversed(range(2, len(shape))) for n in (0, kernel[d] if d in empty else 0)]
    result = local.emit(call.target, (local.emit(aten.constant_pad_nd.default, (args[0], pads), {}), *args[1:]), kwargs)
    return local.emit(aten.slice.Tensor, (result, empty[0], 0, 0), {})


TABLE: list[tuple[Any, OpEntry | RuleFn]] = [
    (aten.convolution.default, OpEntry(convolution, _convolution_local)),
]
