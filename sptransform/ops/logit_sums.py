"""What a loss needs of rows of logits, computed for a few rows at a time: no tensor is larger than chunk x classes.

The backward computes a chunk's logits again. Of the products with the weight there are then four instead of three, and
nothing of the size of the logits is kept. Gradients made in the forward would save that product, but not memory, and
need a loss that is one sum: here every row has a gradient of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sptransform.ops.library import LIBRARY, primitive
from sptransform.ops.mask_gradients import gradients
from sptransform.ops.mask_program import parse
from sptransform.ops.ring.kernels.interface import compute_dtype


def _logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, columns: Sequence[Tensor], program: str
) -> tuple[Tensor, Tensor]:
    """The product, and the logits that the program makes of it, in the dtype in which torch sums."""
    product = functional.linear(x, weight, bias)
    logits = parse(program).run([product, *columns])
    return product, logits.to(compute_dtype(logits.dtype))


def sum_dtype(x: Tensor, columns: Sequence[Tensor], program: str) -> torch.dtype:
    """The dtype of what :func:`logit_sums` gives; the tensors may be fake."""
    return compute_dtype(parse(program).run([each.new_empty(0) for each in (x, *columns)]).dtype)


def _chunks(num_rows: int, chunk: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk, num_rows)) for start in range(0, num_rows, chunk))


def _finite(x: Tensor) -> Tensor:
    """``x`` with 0 for -inf, which differs from -inf by no number."""
    return x.masked_fill(x == -torch.inf, 0.0)


def _fake(x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, columns: list[Tensor], **options: Any):
    dtype = sum_dtype(x, columns, options["program"])
    return tuple(x.new_empty(x.shape[0], dtype=dtype) for _ in range(4))


# Of every row of logits [n, classes]: the largest logit; the logarithm of the sum of the exponentials of the others'
# differences to it; the label's logit, and the sum of all, both as such differences. A label of -1 has no logit: 0.
# The sum is 0 unless it is asked for. Logits are what the mask program makes of %0, the product, and of the columns
# [classes] or []. Without classes, or where all logits are -inf, the first two are -inf.
@primitive(
    "logit_sums(Tensor x, Tensor weight, Tensor labels, Tensor? bias, Tensor[] columns, *, str program, int chunk, "
    "bool summed) -> (Tensor largest, Tensor logsum, Tensor picked, Tensor total)",
    fake=_fake,
)
def logit_sums(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    columns: list[Tensor],
    *,
    program: str,
    chunk: int,
    summed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = _fake(x, weight, labels, bias, columns, program=program)
    for out, empty in zip(found, (-torch.inf, -torch.inf, 0.0, 0.0), strict=True):
        out.fill_(empty)
    if not weight.shape[0]:
        return found
    with torch.autocast(x.device.type, enabled=False):
        for rows in _chunks(x.shape[0], chunk):
            largest, logsum, picked, total = (out[rows] for out in found)
            logits = _logits(x[rows], weight, bias, columns, program)[1]
            torch.amax(logits, 1, out=largest)
            logits.sub_(_finite(largest)[:, None])
            own = labels[rows]
            picked.copy_(logits.gather(1, own.clamp(min=0)[:, None])[:, 0].masked_fill_(own < 0, 0.0))
            if summed:
                torch.sum(logits, 1, out=total)
            torch.log(logits.exp_().sum(1), out=logsum)
    return found


def _fake_backward(
    x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, *_: Any, needed: Sequence[bool], **__: Any
) -> list[Tensor]:
    return [x.new_empty(operand.shape) for operand in _needed(x, weight, bias, needed)]


def _needed(x: Tensor, weight: Tensor, bias: Tensor | None, needed: Sequence[bool]) -> list[Tensor]:
    return [operand for operand, is_needed in zip((x, weight, bias), needed, strict=True) if is_needed]


# The gradients of those of x, weight and bias that are needed. Those of weight and bias are sums over all chunks, in
# float32 for 16 bits.
@primitive(
    "logit_sums_backward(Tensor x, Tensor weight, Tensor labels, Tensor? bias, Tensor[] columns, Tensor largest, "
    "Tensor logsum, Tensor of_logsum, Tensor of_picked, Tensor of_total, *, str program, int chunk, bool summed, "
    "bool[] needed) -> Tensor[]",
    fake=_fake_backward,
)
def logit_sums_backward(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    columns: list[Tensor],
    largest: Tensor,
    logsum: Tensor,
    of_logsum: Tensor,
    of_picked: Tensor,
    of_total: Tensor,
    *,
    program: str,
    chunk: int,
    summed: bool,
    needed: list[bool],
) -> list[Tensor]:
    wide = compute_dtype(x.dtype)
    found = [
        None if operand is None or not is_needed else torch.zeros_like(operand, dtype=dtype)
        for operand, is_needed, dtype in zip((x, weight, bias), needed, (x.dtype, wide, wide), strict=True)
    ]
    of_x, of_weight, of_bias = found
    largest, logsum = _finite(largest), _finite(logsum)
    with torch.autocast(x.device.type, enabled=False):
        for rows in _chunks(x.shape[0], chunk) if weight.shape[0] else ():
            product, logits = _logits(x[rows], weight, bias, columns, program)
            # the larger part first: logits may be large and close
            grad = torch.sub(logits, largest[rows, None]).sub_(logsum[rows, None]).exp_().mul_(of_logsum[rows, None])
            own = labels[rows]
            picked = of_picked[rows].masked_fill(own < 0, 0.0)
            grad.scatter_add_(1, own.clamp(min=0)[:, None], picked[:, None])
            if summed:
                grad.add_(of_total[rows, None])
            grad = grad.to(torch.promote_types(grad.dtype, product.dtype))
            grad = gradients(parse(program), [product, *columns], [0], grad)[0].to(product.dtype)
            if of_x is not None:
                torch.mm(grad, weight, out=of_x[rows])
            if of_weight is not None:
                _add_product(of_weight, grad.t(), x[rows])
            if of_bias is not None:
                of_bias.add_(grad.sum(0, dtype=wide))
    return [x.to(operand.dtype) for x, operand in zip(found, (x, weight, bias), strict=True) if x is not None]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product to ``total``, whose dtype may be wider; then the product is not rounded before."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        total.add_(torch.mm(left, right, out_dtype=total.dtype))
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def _remember(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Any, ...]) -> None:
    x, weight, labels, bias, columns = inputs
    largest, logsum, _, _ = output
    ctx.options, ctx.num_columns = keyword_only_inputs, len(columns)
    ctx.save_for_backward(x, weight, labels, bias, *columns, largest, logsum)
    # whatever number is subtracted from all logits, and added again, changes nothing
    ctx.mark_non_differentiable(largest)


def _backward(ctx: Any, _: Tensor, *of_sums: Tensor) -> tuple[Any, ...]:
    x, weight, labels, bias, *columns, largest, logsum = ctx.saved_tensors
    needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[3]]
    found = iter(
        torch.ops.sptransform.logit_sums_backward(
            x, weight, labels, bias, columns, largest, logsum, *of_sums, **ctx.options, needed=needed
        )
    )
    of_x, of_weight, of_bias = (next(found) if is_needed else None for is_needed in needed)
    return of_x, of_weight, None, of_bias, [None] * ctx.num_columns


torch.library.register_autograd("sptransform::logit_sums", _backward, setup_context=_remember, lib=LIBRARY)
