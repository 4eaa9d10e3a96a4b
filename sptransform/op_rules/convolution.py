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

    Windows that overlap, or leave a rest, need neighbours: those dimensions stay whole. So do channels, since a bias
    would be added by every rank, and groups. None for transposed ones, and where a batch of one is left out.
    """
    x, weight, result = call.operand_shapes[0], call.operand_shapes[1], call.result_shapes[0]
    if call.argument("transposed") or len(x) != len(weight):
        return None
    sizes = {"n": x[0], "c": x[1], "w": weight[1], "o": weight[0]}
    operand, kernel, out = [dim_of("n", x[0]), dim_of("c", x[1])], [dim_of("o", weight[0]), dim_of("w", weight[1])], []
    whole = {"c", "w", "o"}
    settings = (call.argument(name) for name in ("stride", "padding", "dilation"))
    for d, (stride, padding, dilation) in enumerate(zip(*settings, strict=True)):
        width, source, target = weight[d + 2], x[d + 2], result[d + 2]
        apart = stride == width and padding == 0 and dilation == 1 and source == target * width
        names = (f"i{d}", f"k{d}") if apart else (f"r{d}", f"k{d}")
        sizes |= {names[0]: target, names[1]: width}
        operand.append((*dim_of(names[0], target), *dim_of(names[1], width)) if apart else dim_of(f"s{d}", source))
        kernel.append(dim_of(names[1], width))
        out.append(dim_of(names[0], target))
        whole.add(names[1])
        if not apart:
            sizes[f"s{d}"] = source
            whole |= {f"r{d}", f"s{d}"}
    operands = [tuple(operand), tuple(kernel), *([(dim_of("o", weight[0]),)] if len(call.operand_shapes) == 3 else [])]
    results = ((dim_of("n", x[0]), dim_of("o", weight[0]), *out),)
    return OpRule(tuple(operands), results, sizes, replicated=frozenset(whole & set(sizes)), heavy=True)


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
