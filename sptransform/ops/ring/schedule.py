"""Ring attention's two rings, as steps of :mod:`sptransform.ops.communication.steps` (Liu et al., arXiv 2310.01889).

Rank r starts with its own keys and values. It passes each block that it gets from rank r - 1 on to rank r + 1, so at
step s it holds the block of rank r - s. The next block travels while a step computes, forward and backward.

    forward    K,V (one message)         N - 1 hops
    backward   K,V again                 N - 1 hops, ahead of the gradients
               sums of their gradients   N - 1 hops: rank j + 1 starts the sum for block j, rank j adds its part last

At any time a rank holds its own K,V, the block it computes with, and the block that is arriving. Results are summed in
float32 (float64 for float64 inputs), and gradients travel in that dtype too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sptransform.ops.communication.steps import Steps, Wait
from sptransform.ops.ring.blocks import lay_out
from sptransform.ops.ring.joined import Part
from sptransform.ops.ring.kernels.interface import compute_dtype
from sptransform.ops.ring.plan import Call
from sptransform.ops.ring.rank_view import RankView, of_batch
from sptransform.ops.ring.sums import IN_PLACE, Sums

_sp = torch.ops.sptransform


def forward_steps(
    rank: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    sinks: Tensor | None = None,
    tables: Sequence[Tensor] | None = None,
    *,
    sums: Sums = IN_PLACE,
    **options: Any,
) -> Steps[tuple[Tensor, Tensor, Tensor]]:
    """The steps of ``ring_attention``; ``options`` are its keyword arguments."""
    dropout = options.get("dropout_p", 0.0) > 0
    seed = _sp.dropout_seed(query) if dropout else query.new_zeros((), dtype=torch.int64)
    view = RankView(rank, query, key, value, rows, columns, seed, tables, reads_data=sums is IN_PLACE, **options)
    result = None
    held = view.pack() if view.num_ranks > 1 else None
    for step in range(view.num_ranks):
        is_last = step + 1 == view.num_ranks
        if not is_last:
            coming = yield view.hop(held, view.block_at(step + 1))
        result = _attend(view, sums, step, held, result)
        if not is_last:
            held = yield Wait(coming)
    out, lse = result or _nothing(query, value)
    if sinks is not None:
        if options.get("explicit"):
            raise ValueError("attention with sinks is not explicit: the backward reads them from lse")
        out, lse = _sp.merge_sinks(_summed(out), lse, sinks)
    return lay_out(out, query.dtype), lse, seed


def backward_steps(
    rank: int,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    seed: Tensor,
    tables: Sequence[Tensor] | None = None,
    *,
    sums: Sums = IN_PLACE,
    **options: Any,
) -> Steps[list[Tensor]]:
    """The steps of ``ring_attention_backward``: gradients of query, key, value and the trained operands of the mask.

    It knows nothing of sinks: they are in ``out`` and ``lse``, as the keys of other ranks are.
    """
    view = RankView(rank, query, key, value, rows, columns, seed, tables, reads_data=sums is IN_PLACE, **options)
    whole = (grad, out, lse)
    of_operands = view.no_operand_gradients()
    grad_query = returning = None
    held = view.pack() if view.num_ranks > 1 else None
    for step in range(view.num_ranks):
        is_last = step + 1 == view.num_ranks
        if not is_last:
            coming = yield view.hop(held, view.block_at(step + 1))
        grad_query, first, parts = _attend_backward(view, sums, step, held, whole, grad_query, of_operands)
        if step == 0:
            own = parts  # covers all keys of this rank
        else:
            message = _no_gradients(view, step) if returning is None else (yield Wait(returning))
            message = sums.add_to_message(message, *parts, first)
            returning = yield view.hop(message, view.block_at(step + 1))
        if not is_last:
            held = yield Wait(coming)
    if returning is not None:
        others = view.unpack((yield Wait(returning)), view.own)
        own = [sums.add(_summed(mine), other, 0) for mine, other in zip(own, others, strict=True)]
    if grad_query is None:
        grad_query = _zeros(query, query.shape[2])
    trained = [view.operands[i] for i in view.trained]
    of_operands = [total.view(x.shape).to(x.dtype) for total, x in zip(of_operands, trained, strict=True)]
    return [*(lay_out(x, query.dtype) for x in (grad_query, *own)), *of_operands]


def _attend(view: RankView, sums: Sums, step: int, held: Tensor | None, result: Any) -> Any:
    """Merge this step's block into ``result``, the (out, lse) of earlier steps or None."""
    for batch, start, found, may_sink in _results(view, view.block_at(step), *_keys_at(view, step, held)):
        if result is None and found[1].shape == view.query.shape[:3]:
            result = found
            continue
        out, lse = result or _nothing(view.query, view.value)
        out = _summed(out)
        merged = sums.merge(*(of_batch(x, batch) for x in (out, lse)), *found, start, may_sink)
        result = merged if batch is None else (out, lse)
    return result


def _results(view: RankView, block: int, key: Tensor, value: Tensor) -> Iterator[tuple[Any, int, Any, bool]]:
    """(sequences, first row, (out, lse), whether rows may be sunk) of all calls on a block."""
    for group in view.joined(block):
        for part in group.results(view.query, key, value):
            yield *part, False
    for call, options in view.calls(block):
        yield _result(view, block, (key, value), call, options)


def _result(
    view: RankView, block: int, keys: tuple[Tensor, Tensor], call: Call, options: dict[str, Any]
) -> tuple[Any, int, Any, bool]:
    mask = view.mask(call, block)  # let go before the next call makes its own
    xs = _queries(view.query, call), *(_keys(x, call) for x in keys)
    found = _sp.attention_block(*xs, mask, call.kind == "causal", **options)
    return call.batch, call.q_start, found, mask is not None and mask.is_floating_point()


def _attend_backward(
    view: RankView,
    sums: Sums,
    step: int,
    held: Tensor | None,
    whole: tuple[Tensor, ...],
    grad_query: Tensor | None,
    of_operands: list[Tensor],
) -> tuple[Tensor | None, int, list[Tensor]]:
    """``grad_query`` plus this step's part; the first key with gradients; the gradients of keys and values.

    This step's part of the gradients of the mask's operands is added to ``of_operands``.
    """
    block = view.block_at(step)
    keys = _keys_at(view, step, held)
    first, stop = (0, keys[0].shape[2]) if step == 0 else view.reach(block)
    parts: list[Tensor | None] = [None, None]
    for of_queries, of_keys, operands in _gradients(view, block, keys, whole):
        for batch, start, (found,) in of_queries:
            grad_query = _add(sums, grad_query, found, start, (view.query, view.query.shape[2]), batch)
        for batch, start, found in of_keys:
            parts = [
                _add(sums, total, x, start - first, (own, stop - first), batch)
                for total, x, own in zip(parts, found, keys, strict=True)
            ]
        _add_to_operands(sums, of_operands, operands)
    return (
        grad_query,
        first,
        [_zeros(x, stop - first) if part is None else part for part, x in zip(parts, keys, strict=True)],
    )


def _gradients(
    view: RankView, block: int, keys: tuple[Tensor, Tensor], whole: tuple[Tensor, ...]
) -> Iterator[tuple[list[Part], list[Part], Iterable[Any]]]:
    """The gradients of queries, of keys and values, and of the mask's operands, of all calls on a block."""
    grad, out, lse = whole
    for group in view.joined(block):
        yield *group.gradients(grad, view.query, *keys, out, lse), ()
    for call, options in view.calls(block):
        yield _gradients_of(view, block, keys, whole, call, options)


def _gradients_of(
    view: RankView,
    block: int,
    keys: tuple[Tensor, Tensor],
    whole: tuple[Tensor, ...],
    call: Call,
    options: dict[str, Any],
) -> tuple[list[Part], list[Part], Iterable[Any]]:
    grad, out, lse = whole
    xs = grad, view.query, *keys, out, lse
    places = _queries, _queries, _keys, _keys, _queries, _queries
    grad_rows, query, key, value, *rest = (place(x, call) for place, x in zip(places, xs, strict=True))
    mask = view.mask(call, block)  # let go before the next call makes its own
    backward = _sp.attention_block_backward_with_mask if view.trained else _sp.attention_block_backward
    found = backward(grad_rows, query, key, value, mask, *rest, call.kind == "causal", **options)
    of_query, of_key, of_value, *of_mask = found
    operands = view.operand_gradients(call, block, *of_mask) if view.trained else ()
    of_keys = [(call.batch, call.k_start, (of_key, of_value))]
    return [(call.batch, call.q_start, (of_query,))], of_keys, operands


def _add_to_operands(sums: Sums, totals: list[Tensor], parts: Iterable[tuple[Tensor, int, list[int]]]) -> None:
    for i, part in enumerate(parts):
        totals[i] = sums.add_to_operand(totals[i], *part)


def _keys_at(view: RankView, step: int, held: Tensor | None) -> tuple[Tensor, Tensor]:
    return (view.key, view.value) if step == 0 else view.unpack(held, view.block_at(step))


def _add(
    sums: Sums, total: Tensor | None, block: Tensor, start: int, like: tuple[Tensor, int], batch: tuple[int, int] | None
) -> Tensor:
    """``total``, or zeros for ``like``, a tensor and a number of rows, with ``block`` added from row ``start`` on."""
    if total is None:
        whole, size = like
        if (block.shape[0], block.shape[2]) == (whole.shape[0], size):
            return block
        total = _zeros(whole, size)
    total = _summed(total)
    added = sums.add(of_batch(total, batch), block, start)
    return added if batch is None else total


def _summed(x: Tensor) -> Tensor:
    """The result of one block, or a sum of several, as the sum to which others are added."""
    return x.to(compute_dtype(x.dtype))


def _no_gradients(view: RankView, step: int) -> Tensor:
    return view.query.new_zeros(view.numel_of(view.block_at(step)), dtype=compute_dtype(view.query.dtype))


def _queries(x: Tensor, call: Call) -> Tensor:
    """What a call's queries have of x [B, H, s, ..]."""
    return _part(of_batch(x, call.batch), call.q_start, call.q_stop)


def _keys(x: Tensor, call: Call) -> Tensor:
    return _part(of_batch(x, call.batch), call.k_start, call.k_stop)


def _part(x: Tensor, start: int, stop: int) -> Tensor:
    return x if stop - start == x.shape[2] else x.narrow(2, start, stop - start)


def _zeros(x: Tensor, size: int) -> Tensor:
    batch, heads, _, dim = x.shape
    return x.new_zeros((batch, size, heads, dim), dtype=compute_dtype(x.dtype)).transpose(1, 2)


def _nothing(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of queries that have seen no key."""
    batch, heads, size, _ = query.shape
    dtype = compute_dtype(query.dtype)
    out = query.new_zeros((batch, size, heads, value.shape[3]), dtype=dtype).transpose(1, 2)
    return out, query.new_full((batch, heads, size), -torch.inf, dtype=torch.float64)
