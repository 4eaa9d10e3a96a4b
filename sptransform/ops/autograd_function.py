"""A custom autograd.Function as one op, which runs its forward and its backward as they were captured.

AOTAutograd traces through it, as through any autograd function, so inner backends see plain ops.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from sptransform.ops.body import parse, run
from sptransform.ops.library import composite


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, body: str, flat: list[int], *operands: Tensor) -> tuple[Tensor, ...]:
        read = parse(body)
        values: dict[Any, Any] = dict(zip(read.operands, operands, strict=True))
        with _as_captured(operands):
            run(read.forward, values)
        ctx.body = body
        ctx.save_for_backward(*(values[x] for x in read.saved))
        results = tuple(values[x] for x in read.results)
        ctx.mark_non_differentiable(*(results[i] for i in flat))
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        read = parse(ctx.body)
        values: dict[Any, Any] = dict(zip(read.saved, ctx.saved_tensors, strict=True))
        values |= zip(read.given, grads, strict=True)
        with _as_captured(grads):
            run(read.backward, values)
        return None, None, *(None if x is None else values[x] for x in read.gradients)


@contextmanager
def _as_captured(tensors: tuple[Tensor, ...]) -> Iterator[None]:
    """Without autocast: a body has the casts that it made."""
    with ExitStack() as stack:
        for kind in {x.device.type for x in tensors}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@composite("autograd_function(str name, Tensor[] operands, Tensor[] constants, str body, int[] flat) -> Tensor[]")
def autograd_function(
    name: str, operands: list[Tensor], constants: list[Tensor], body: str, flat: list[int]
) -> list[Tensor]:
    """The results of the function called ``name``; those of the indices in ``flat`` have no gradient.

    The body has the constants behind the operands.
    """
    return list(_Function.apply(body, flat, *operands, *constants))
