"""Convolutions: channels are contracted group by group, and a kernel moves along the other dimensions."""

from __future__ import annotations

from typing import Any

import torch

from sptransform.op_rules.windows import Along, each, has_halo, is_nothing, nothing, run_on_rows, windows_of
from sptransform.rules.factors import dim_of
from sptransform.rules.rule import OpCall, OpRule
from sptransform.rules.table import Local, OpEntry
from sptransform.sharding.sizes import Size

aten = torch.ops.aten


def convolution(call: OpCall) -> OpRule | None:
    """Channels are contracted group by group; a dimension that the kernel moves along keeps its axis.

    With a bias the contracted channels stay whole, as in a linear. None for transposed convolutions.
    """
    if call.target is aten.convolution.default and call.argument("transposed"):
        return None
    weight, has_bias = call.operand_shapes[1], call.operand("bias") is not None
    along = Along(windows_of(call, weight[2:]))
    groups = call.argument("groups")
    sizes: dict[str, Size] = {"groups": groups, "in": weight[1], "out": weight[0] // groups} | along.sizes
    replicated = {*along.replicated}
    channels, made = (_named(sizes, "groups", name) for name in ("in", "out"))
    batch: tuple[tuple[str, ...], ...] = ()
    if len(call.operand_shapes[0]) == len(along.windows) + 2:
        sizes["batch"] = call.operand_shapes[0][0]
        batch = (dim_of("batch", sizes["batch"]),)
    contracted = {"reduce": frozenset({"in"}), "linear": (frozenset({0}), frozenset({1}))}
    if has_bias:
        replicated.add("in")
        contracted = {}
    operands = [(*batch, channels, *along.rows), (made, dim_of("in", weight[1]), *along.kernels), (made,)]
    present = {f for dims in operands[: 2 + has_bias] for names in dims for f in names}
    present |= {f for names in along.outputs for f in names}
    if "reduce" in contracted:
        contracted["reduce"] &= present
    return OpRule(
        tuple(operands[: 2 + has_bias]),
        ((*batch, made, *along.outputs),),
        {name: size for name, size in sizes.items() if name in present},
        replicated=frozenset(replicated & present),
        resize=along.resize,
        heavy=True,
        **along.evidence,
        **contracted,
    )


def _named(sizes: dict[str, Size], *names: str) -> tuple[str, ...]:
    return tuple(name for name in names if sizes[name] != 1)


def _convolution_local(call: OpCall, local: Local) -> Any:
    """The padding is that at this rank's borders; each interval of outputs is a convolution of its own rows."""
    weight = call.operand_shapes[1]
    windows = windows_of(call, weight[2:])
    if is_nothing(local):
        return nothing(local)
    if local.decision.factor == "groups":
        return local.run(call, groups=local.operand_shapes[0][-1 - len(windows)] // weight[1])
    if not has_halo(local):
        return local.run(call)

    def run(x: Any, padding: list[int]) -> Any:
        args, kwargs = local.arguments(call, padding=padding)
        return local.emit(_PLAIN.get(call.target, call.target), (x, *args[1:]), kwargs)

    return run_on_rows(call, local, windows, run)


_PLAIN = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}


def transposed(call: OpCall) -> OpRule | None:
    """Of each row a block of rows; with a bias the contracted channels stay whole. None where blocks overlap."""
    shape, weight = call.operand_shapes[:2]
    has_bias, kernel = call.operand("bias") is not None, weight[2:]
    stride, padding, extra, dilation = (
        each(call.argument(name), len(kernel)) for name in ("stride", "padding", "output_padding", "dilation")
    )
    if stride != [*kernel] or any((*padding, *extra)) or set(dilation) != {1}:
        return None
    groups = call.argument("groups")
    sizes: dict[str, Size] = {"groups": groups, "in": weight[0] // groups, "out": weight[1]}
    sizes |= {f"i{d}": size for d, size in enumerate(shape[-len(kernel) :])}
    sizes |= {f"k{d}": size for d, size in enumerate(kernel)}
    batch = [("batch",)] if len(shape) == len(weight) else []
    sizes |= {"batch": shape[0]} if batch else {}
    rows, kernels = ([(f"{name}{d}",) for d in range(len(kernel))] for name in "ik")
    channels, made = ("groups", "in"), ("groups", "out")
    blocks = [(*row, *block) for row, block in zip(rows, kernels, strict=True)]
    operands = [[*batch, channels, *rows], [channels, ("out",), *kernels], [made]][: 2 + has_bias]
    *operands, result = (
        tuple(_named(sizes, *names) for names in dims) for dims in (*operands, [*batch, made, *blocks])
    )
    sizes = {name: size for name, size in sizes.items() if size != 1}
    contracted = frozenset({"in"}) & set(sizes)
    whole = frozenset(f"k{d}" for d in range(len(kernel))) & set(sizes)
    return OpRule(
        tuple(operands),
        (result,),
        sizes,
        replicated=whole | (contracted if has_bias else frozenset()),
        reduce=frozenset() if has_bias else contracted,
        linear=() if has_bias else (frozenset({0}), frozenset({1})),
        heavy=True,
    )


def _transposed_local(call: OpCall, local: Local) -> Any:
    if is_nothing(local):
        return nothing(local)
    if local.decision.factor != "groups":
        return local.run(call)
    of_group = call.operand_shapes[1][0] // call.argument("groups")
    return local.run(call, groups=local.operand_shapes[1][0] // of_group)


_CONVOLUTION = OpEntry(convolution, _convolution_local)
_TRANSPOSED = OpEntry(transposed, _transposed_local)

TABLE: list[tuple[Any, OpEntry]] = [
    (aten.conv1d.default, _CONVOLUTION),
    (aten.conv1d.padding, _CONVOLUTION),
    (aten.conv2d.default, _CONVOLUTION),
    (aten.conv2d.padding, _CONVOLUTION),
    (aten.conv3d.default, _CONVOLUTION),
    (aten.conv3d.padding, _CONVOLUTION),
    (aten.conv_transpose1d.default, _TRANSPOSED),
    (aten.conv_transpose2d.input, _TRANSPOSED),
    (aten.conv_transpose3d.input, _TRANSPOSED),
    (aten.convolution.default, _CONVOLUTION),
]
