"""Rows of images in blocks, or repeated: unfolding, pixel shuffles, resizing by a whole number."""

from __future__ import annotations

from typing import Any

import torch

from sptransform.op_rules.windows import each, is_nothing, nothing
from sptransform.rules.factors import dim_of, dims_and_sizes
from sptransform.rules.rule import Dims, OpCall, OpRule
from sptransform.rules.table import Local, OpEntry
from sptransform.sharding.sizes import Size, quotient

aten = torch.ops.aten


_LINEAR = (frozenset({0}),)


def unfolded(call: OpCall) -> OpRule:
    """``[.., c, (i k), (j l)] -> [.., (c k l), (i j)]``, blocks of an image as columns; and the other way."""
    is_fold = call.target is aten.col2im.default
    image = call.result_shapes[0] if is_fold else call.operand_shapes[0]
    kernel, stride, dilation, padding = (
        each(call.argument(name), 2) for name in ("kernel_size", "stride", "dilation", "padding")
    )
    columns = call.operand_shapes[0] if is_fold else call.result_shapes[0]
    *lead, channels = ((f"d{at}", size) for at, size in enumerate(image[:-2]))
    are_blocks = kernel == stride and not any(padding) and dilation == [1, 1]
    if are_blocks and all(quotient(size, block) is not None for size, block in zip(image[-2:], kernel, strict=True)):
        i, j = (quotient(size, block) for size, block in zip(image[-2:], kernel, strict=True))
        named = [*lead, channels, ("i", i), ("j", j), ("k", kernel[0]), ("l", kernel[1])]
        of_image, of_columns = [["i", "k"], ["j", "l"]], [[channels[0], "k", "l"], ["i", "j"]]
        replicated = {"k", "l"}
    else:
        named = [*lead, channels, ("h", image[-2]), ("w", image[-1]), ("kl", kernel[0] * kernel[1]), ("n", columns[-1])]
        of_image, of_columns = [["h"], ["w"]], [[channels[0], "kl"], ["n"]]
        replicated = {"h", "w", "kl", "n"}
    sizes = {name: size for name, size in named if size != 1}
    first = [[name] for name, _ in lead]
    pair = _dims([*first, [channels[0]], *of_image], sizes), _dims([*first, *of_columns], sizes)
    operand, result = pair[::-1] if is_fold else pair
    return OpRule((operand,), (result,), sizes, replicated=frozenset(replicated & set(sizes)), linear=_LINEAR)


def _dims(names: list[list[str]], sizes: dict[str, Size]) -> Dims:
    return tuple(tuple(name for name in group if name in sizes) for group in names)


def _unfolded_local(call: OpCall, local: Local) -> Any:
    if is_nothing(local):
        return nothing(local)
    changed = {"output_size": list(local.result_shapes[0][-2:])} if call.target is aten.col2im.default else {}
    return local.run(call, **changed)


def shuffled(call: OpCall) -> OpRule:
    """``[.., (c k l), i, j] -> [.., c, (i k), (j l)]``, and the other way."""
    is_shuffle = call.target is aten.pixel_shuffle.default
    blocks, image = (call.operand_shapes[0], call.result_shapes[0])[:: 1 if is_shuffle else -1]
    factor = call.argument("upscale_factor" if is_shuffle else "downscale_factor")
    *lead, channels = ((f"d{at}", size) for at, size in enumerate(image[:-2]))
    named = [*lead, channels, ("i", blocks[-2]), ("j", blocks[-1]), ("k", factor), ("l", factor)]
    sizes = {name: size for name, size in named if size != 1}
    first = [[name] for name, _ in lead]
    pair = (
        _dims([*first, [channels[0], "k", "l"], ["i"], ["j"]], sizes),
        _dims([*first, [channels[0]], ["i", "k"], ["j", "l"]], sizes),
    )
    operand, result = pair if is_shuffle else pair[::-1]
    return OpRule((operand,), (result,), sizes, replicated=frozenset({"k", "l"} & set(sizes)), linear=_LINEAR)


def _shuffled_local(call: OpCall, local: Local) -> Any:
    return nothing(local) if is_nothing(local) else local.run(call)


def resized(call: OpCall) -> OpRule:
    """Rows that are repeated a whole number of times, or as many as before, keep their axis; others stay whole."""
    shape, target = call.operand_shapes[0], call.result_shapes[0]
    dims, sizes = dims_and_sizes(shape)
    num = len(shape) - 2
    scales = call.argument("scale_factors") or [None] * num
    result, replicated = list(dims), set()
    for dim, scale in zip(range(2, len(shape)), scales, strict=True):
        times = quotient(target[dim], shape[dim])
        is_repeated = times == 1 or (times is not None and call.target in _NEAREST)
        if is_repeated and (scale is None or scale == times):
            sizes[f"r{dim}"] = times
            result[dim] = (*dims[dim], *dim_of(f"r{dim}", times))
            replicated.add(f"r{dim}")
        else:
            sizes[f"o{dim}"] = target[dim]
            result[dim] = dim_of(f"o{dim}", target[dim])
            replicated.update({f"o{dim}", *dims[dim]})
    present = {f for names in (*dims, *result) for f in names}
    return OpRule(
        (dims,),
        (tuple(result),),
        {name: size for name, size in sizes.items() if name in present},
        replicated=frozenset(replicated & present),
        linear=_LINEAR,
    )


def _resized_local(call: OpCall, local: Local) -> Any:
    """To the size of this rank's rows. What is not cut is resized by the scale that was given."""
    if is_nothing(local):
        return nothing(local)
    if local.decision.factor in ("i0", "i1"):
        return local.run(call)
    return local.run(call, output_size=list(local.result_shapes[0][2:]), scale_factors=None)


_NEAREST = {
    aten._upsample_nearest_exact1d.vec,
    aten._upsample_nearest_exact2d.vec,
    aten._upsample_nearest_exact3d.vec,
    aten.upsample_nearest1d.vec,
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest3d.vec,
}
_RESIZED = OpEntry(resized, _resized_local)
_SHUFFLED = OpEntry(shuffled, _shuffled_local)
_UNFOLDED = OpEntry(unfolded, _unfolded_local)

TABLE: list[tuple[Any, OpEntry]] = [
    (aten._upsample_bicubic2d_aa.vec, _RESIZED),
    (aten._upsample_bilinear2d_aa.vec, _RESIZED),
    (aten._upsample_nearest_exact1d.vec, _RESIZED),
    (aten._upsample_nearest_exact2d.vec, _RESIZED),
    (aten._upsample_nearest_exact3d.vec, _RESIZED),
    (aten.col2im.default, _UNFOLDED),
    (aten.im2col.default, _UNFOLDED),
    (aten.pixel_shuffle.default, _SHUFFLED),
    (aten.pixel_unshuffle.default, _SHUFFLED),
    (aten.upsample_bicubic2d.vec, _RESIZED),
    (aten.upsample_bilinear2d.vec, _RESIZED),
    (aten.upsample_linear1d.vec, _RESIZED),
    (aten.upsample_nearest1d.vec, _RESIZED),
    (aten.upsample_nearest2d.vec, _RESIZED),
    (aten.upsample_nearest3d.vec, _RESIZED),
    (aten.upsample_trilinear3d.vec, _RESIZED),
]
