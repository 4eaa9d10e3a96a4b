"""The ops of a ring: attention of one block, its backward, and merging of blocks.

Each is one node of an expanded graph. Block results have the dtype in which the kernel gives them, and are merged into
float32 (float64 for float64 inputs); lse is float64. Their memory layout is ``[B, s, H, D]``, as in the kernels and in
the surrounding models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sptransform.ops.library import primitive
from sptransform.ops.ring.dropout import kept_of
from sptransform.ops.ring.fused import fused
from sptransform.ops.ring.kernels.interface import Case, Kernel, compute_dtype
from sptransform.ops.ring.kernels.reference import OPEN
from sptransform.ops.ring.kernels.table import choose
from sptransform.ops.ring.merging import raise_sunk, shift_of, sink, weigh, with_sinks

_OPTIONS = (
    "bool causal, *, float? scale=None, float softcap=0.0, float dropout_p=0.0, Tensor? seed=None, int stream=0, "
    "int[] key_head_of=[], bool explicit=False, bool sliding=False, "
    "bool varying=False"
)


def new_rows(x: Tensor, size: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Empty [B, H, size, dim] for x [B, H, .., ..], in the memory layout of block results."""
    return x.new_empty((x.shape[0], size, x.shape[1], dim), dtype=dtype).transpose(1, 2)


def lay_out(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype`` and the memory layout of block results; not copied if it has both."""
    x = x.to(dtype)
    return x if x.transpose(1, 2).is_contiguous() else x.transpose(1, 2).contiguous().transpose(1, 2)


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    *,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    explicit: bool = False,
    sliding: bool = False,
    varying: bool = False,
    **_: Any,
) -> Kernel:
    """The kernel for such a block."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    if (causal or sliding) and (num_queries > num_keys or mask is not None):
        raise ValueError(
            f"a window of {num_keys} keys over {num_queries} queries {'beside a mask' if mask is not None else ''}"
        )
    windowed = sliding or (causal and num_queries != num_keys)
    is_explicit = explicit or dropout_p > 0
    how = {"masked": mask is not None, "explicit": is_explicit, "windowed": windowed, "varying": varying}
    return choose(Case.of(query, value, softcap=softcap, **how))


def _fake_block(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, **options: Any):
    dtype = _kernel(query, key, value, mask, causal, **options).result_dtype(query.dtype)
    out = new_rows(query, query.shape[2], value.shape[-1], dtype)
    return out, query.new_empty(query.shape[:3], dtype=torch.float64)


@primitive(
    f"attention_block(Tensor query, Tensor key, Tensor value, Tensor? mask, {_OPTIONS}) -> (Tensor, Tensor)",
    fake=_fake_block,
)
def attention_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    key_head_of: list[int] = (),
    explicit: bool = False,
    sliding: bool = False,
    varying: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of query [B, H, s, D] over key [B, K, t, D] and value [B, K, t, E], none of them empty.

    Args:
        mask: boolean (True is visible) or added to the scores; broadcasts to [B, H, s, t].
        causal: the last query sees all keys, and each query one key less than the next; then s <= t, and no mask.
        softcap: before the mask, scores are ``softcap * tanh(score / softcap)``; 0 is none.
        seed, stream: which random numbers dropout uses.
        key_head_of: query head i reads key head ``key_head_of[i]``; ``i // (H // K)`` where it is empty.
        explicit: the keys are all that the queries see, and the backward computes the softmax of their scores again. So
            it is exact for a row of which every key is masked by a large number, beside which ``lse`` loses its digits.
        sliding: the first query sees from the first key on, and each query from one key later than the one before; then
            s <= t, and no mask.
        varying: numbers of queries and keys come from data, which tells against kernels that are compiled for them.

    Returns:
        out [B, H, s, E], in the dtype in which the kernel gives it; lse [B, H, s] in float64 (see :mod:`merging`),
        ``-inf`` where a row sees nothing. Dropout does not enter lse.
    """
    how = {"softcap": softcap, "dropout_p": dropout_p, "explicit": explicit, "sliding": sliding, "varying": varying}
    kernel = _kernel(query, key, value, mask, causal, **how)
    heads = _heads(query, key, key_head_of, kernel)
    if heads is not None:
        key, value = key.index_select(1, heads), value.index_select(1, heads)
    bias = shift = None
    if mask is not None:
        bias, shift = _bias(mask, query, key.shape[2])
    extra = _extra(softcap, dropout_p, seed, stream, sliding)
    out, lse = kernel.forward(query, key, value, bias, causal, scale_of(query, scale), **extra)
    if mask is not None:
        if shift is not None:
            lse = sink(lse, bias) + shift
        lse = lse.masked_fill(bias.amax(-1) == -math.inf, -math.inf)
    return lay_out(out, out.dtype), lse.to(torch.float64).contiguous()


_BACKWARD = (
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor out, Tensor lse, " + _OPTIONS + ")"
)


def _fake_block_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    *,
    has_trained_mask: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = OPEN if has_trained_mask else _kernel(query, key, value, mask, causal, **options)
    dtype = kernel.result_dtype(query.dtype)
    is_summed = repeats_heads(query, key, options.get("key_head_of", ()), kernel)
    of_keys = compute_dtype(query.dtype) if is_summed else dtype
    dtypes = dtype, of_keys, of_keys
    grads = (new_rows(x, x.shape[2], x.shape[3], y) for x, y in zip((query, key, value), dtypes, strict=True))
    grad_query, grad_key, grad_value = grads
    return grad_query, grad_key, grad_value


@primitive(f"attention_block_backward{_BACKWARD} -> (Tensor, Tensor, Tensor)", fake=_fake_block_backward)
def attention_block_backward(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The contribution of one :func:`attention_block` to the gradients of its query, key and value.

    They have the dtype in which the kernel gives them; sums over query heads that it cannot take itself are float32.
    ``grad`` and ``out`` [B, H, s, E] and ``lse`` [B, H, s] belong to attention over all keys that the queries see.
    """
    grads, _ = _block_backward(*arguments, **options)
    return grads


@primitive(
    f"attention_block_backward_with_mask{_BACKWARD} -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda *arguments, **options: (
        *_fake_block_backward(*arguments, **options, has_trained_mask=True),
        arguments[4].new_empty(arguments[4].shape, dtype=compute_dtype(arguments[1].dtype)),
    ),
)
def attention_block_backward_with_mask(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`attention_block_backward`, and the gradient of the mask, which is added to the scores, in its shape."""
    grads, grad_mask = _block_backward(*arguments, **options, has_trained_mask=True)
    return *grads, grad_mask


def _block_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    key_head_of: list[int] = (),
    explicit: bool = False,
    sliding: bool = False,
    varying: bool = False,
    has_trained_mask: bool = False,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    num_heads = key.shape[1]
    how = {"softcap": softcap, "dropout_p": dropout_p, "explicit": explicit, "sliding": sliding, "varying": varying}
    kernel = _kernel(query, key, value, mask, causal, **how)
    if has_trained_mask:
        kernel = OPEN  # no other gives the gradient of scores
    heads = _heads(query, key, key_head_of, kernel)
    if heads is not None:
        key, value = key.index_select(1, heads), value.index_select(1, heads)
    bias = None
    if mask is not None:
        bias, shift = _bias(mask, query, key.shape[2])
        if shift is not None and not explicit:
            grad, lse = raise_sunk(grad, lse - shift, bias)
        lse = lse.masked_fill(lse == -math.inf, 0)  # makes all probabilities exp(-inf - 0) = 0
    extra = _extra(softcap, dropout_p, seed, stream, sliding) | ({"explicit": True} if explicit else {})
    if has_trained_mask:
        extra["grad_bias"] = torch.zeros_like(bias)
    lse = lse.to(compute_dtype(query.dtype))
    grads = kernel.backward(grad, query, key, value, bias, out, lse, causal, scale_of(query, scale), **extra)
    grad_query, grad_key, grad_value = (lay_out(x, x.dtype) for x in grads)
    if heads is not None:
        grad_key, grad_value = (_sum_heads(x, heads, num_heads) for x in (grad_key, grad_value))
    grad_mask = extra["grad_bias"].sum_to_size(mask.shape) if has_trained_mask else None
    return (grad_query, grad_key, grad_value), grad_mask


def scale_of(query: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(query.shape[-1]) if scale is None else scale


def _repeated_heads(query: Tensor, key: Tensor, key_head_of: Sequence[int], kernel: Kernel) -> list[int] | None:
    """The key head of each query head; None if the kernel reads the keys without repeating them."""
    times = query.shape[1] // key.shape[1]
    regular = [i // times for i in range(query.shape[1])] if times else []
    if list(key_head_of or regular) == regular and (kernel.grouped or times == 1):
        return None
    return list(key_head_of or regular)


def repeats_heads(query: Tensor, key: Tensor, key_head_of: Sequence[int], kernel: Kernel) -> bool:
    """Whether key heads are repeated for the kernel."""
    return _repeated_heads(query, key, key_head_of, kernel) is not None


def _heads(query: Tensor, key: Tensor, key_head_of: Sequence[int], kernel: Kernel) -> Tensor | None:
    heads = _repeated_heads(query, key, key_head_of, kernel)
    return None if heads is None else torch.tensor(heads, device=key.device)


def _sum_heads(x: Tensor, heads: Tensor, num_heads: int) -> Tensor:
    batch, _, size, dim = x.shape
    x = x.to(compute_dtype(x.dtype)).transpose(1, 2)
    return x.new_zeros((batch, size, num_heads, dim)).index_add_(2, heads, x).transpose(1, 2)


def _bias(mask: Tensor, query: Tensor, num_keys: int) -> tuple[Tensor, Tensor | None]:
    """``mask`` as a bias on the scores, with 4 dimensions and expanded over all keys; and for a mask that is added,
    what was taken from its rows (:func:`merging.shift_of`).
    """
    dtype = compute_dtype(query.dtype)
    mask = mask[(None,) * (4 - mask.dim())]
    mask = mask.expand(*mask.shape[:3], num_keys)
    if mask.dtype == torch.bool:
        return torch.where(mask, mask.new_zeros((), dtype=dtype), -math.inf), None
    bias = mask.to(dtype)
    if query.device.type == "cuda" and query.dtype.itemsize == 2:
        # the kernels there round it to the queries' dtype, whose range may be smaller
        lowest = bias.clamp(min=torch.finfo(query.dtype).min)
        bias = torch.where(bias == -math.inf, bias, lowest).to(query.dtype).to(dtype)
    shift = shift_of(bias)
    return (bias - shift[..., None]).contiguous(), shift


def _extra(softcap: float, p: float, seed: Tensor | None, stream: int, sliding: bool) -> dict[str, Any]:
    """The arguments that only kernels that serve the case have."""
    extra: dict[str, Any] = {"softcap": softcap} if softcap else {}
    if sliding:
        extra["sliding"] = True
    if p > 0:
        extra["kept"] = kept_of(p, int(seed.item()) + stream * 0x9E3779B97F4A7C15)
    return extra


@primitive(
    "band_mask(Tensor like, int[] queries, int[] keys, int? nearest, int? farthest) -> Tensor",
    fake=lambda like, queries, keys, nearest, farthest: like.new_empty(
        (sum(queries[1::2]) - sum(queries[::2]), sum(keys[1::2]) - sum(keys[::2])), dtype=torch.bool
    ),
)
def band_mask(like: Tensor, queries: list[int], keys: list[int], nearest: int | None, farthest: int | None) -> Tensor:
    """Boolean [queries, keys]: whether a key lies ``nearest`` to ``farthest`` positions before a query.

    ``queries`` and ``keys`` are bounds of intervals of positions, ``lo, hi, lo, hi ..``.
    """
    of_queries, of_keys = positions(queries, like.device)[:, None], positions(keys, like.device)
    # compared without a matrix of distances, which would take 8 bytes an entry
    visible = None if nearest is None else of_keys <= of_queries - nearest
    if farthest is not None:
        within = of_keys >= of_queries - farthest
        visible = within if visible is None else visible.logical_and_(within)
    if visible is None:
        return torch.ones(len(of_queries), len(of_keys), dtype=torch.bool, device=like.device)
    return visible


def positions(bounds: list[int], device: torch.device) -> Tensor:
    """The positions in intervals ``lo, hi, lo, hi ..``."""
    runs = [torch.arange(lo, hi, device=device) for lo, hi in zip(bounds[::2], bounds[1::2], strict=True)]
    return runs[0] if len(runs) == 1 else torch.cat(runs)


@primitive(
    "merge_block(Tensor out, Tensor lse, Tensor block_out, Tensor block_lse, int start, bool may_sink) "
    "-> (Tensor, Tensor)",
    fake=lambda out, lse, block_out, block_lse, start, may_sink: (torch.empty_like(out), torch.empty_like(lse)),
)
def merge_block(
    out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor, start: int, may_sink: bool
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` with a block merged into the rows from ``start`` on; see :mod:`merging`."""
    out, lse = out.clone(), lse.clone()
    merge_block_(out, lse, block_out, block_lse, start, may_sink)
    return out, lse


def merge_block_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor, start: int, may_sink: bool) -> None:
    """:func:`merge_block` in place."""
    size = block_lse.shape[2]
    out, lse = out.narrow(2, start, size), lse.narrow(2, start, size)
    weight, total = _weigh(lse.flatten(), block_lse.flatten(), may_sink, out.dtype)
    lse.copy_(total.view_as(lse))
    out, block_out, weight = (x.transpose(1, 2) for x in (out, block_out, weight.view(*lse.shape, 1)))
    # compiled for rows that lie in one piece, as some rows of several sequences do not
    num = out.shape[0] if out.is_contiguous() else 1
    for part in zip(*(x.split(num) for x in (out, block_out, weight.contiguous())), strict=True):
        _lerp_(*(x.flatten(0, 1) for x in part))


_weigh = fused(weigh)


@fused
def _lerp_(out: Tensor, block_out: Tensor, weight: Tensor) -> None:
    """Fused, it moves 10 bytes an entry of a 16-bit block. The weights are apart, since their float64 arithmetic would
    be done for every entry.
    """
    out.lerp_(block_out.to(out.dtype), weight)


@primitive(
    "merge_sinks(Tensor out, Tensor lse, Tensor sinks) -> (Tensor, Tensor)",
    fake=lambda out, lse, sinks: (torch.empty_like(out), torch.empty_like(lse)),
)
def merge_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` over all keys with ``sinks`` [H] merged; see :mod:`merging`."""
    return with_sinks(out, lse, sinks)


@primitive(
    "add_block(Tensor total, Tensor block, int start) -> Tensor",
    fake=lambda total, block, start: torch.empty_like(total),
)
def add_block(total: Tensor, block: Tensor, start: int) -> Tensor:
    """``total`` [B, H, s, D] with ``block`` added to its rows from ``start`` on."""
    total = total.clone()
    add_block_(total, block, start)
    return total


def add_block_(total: Tensor, block: Tensor, start: int) -> None:
    """:func:`add_block` in place."""
    total.narrow(2, start, block.shape[2]).add_(block)
