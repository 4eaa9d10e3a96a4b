"""The op ``ring_attention`` and its backward: attention whose queries and keys are sharded over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from sptransform.ops.communication.steps import communicating
from sptransform.ops.library import LIBRARY
from sptransform.ops.ring.blocks import new_rows
from sptransform.ops.ring.merging import grad_of_sinks
from sptransform.ops.ring.schedule import backward_steps, forward_steps

_OPTIONS = (
    "str mask='', int? nearest=None, int? farthest=None, float dropout_p=0.0, float? scale=None, "
    "float softcap=0.0, int[] key_head_of=[], bool explicit=False, str queries='', str keys='', str group_name=''"
)


def _fake(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any):
    out = new_rows(query, query.shape[2], value.shape[3], query.dtype)
    lse = query.new_empty(query.shape[:3], dtype=torch.float64)
    return out, lse, query.new_empty((), dtype=torch.int64)


def _fake_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: list[Tensor],
    columns: list[Tensor],
    out: Tensor,
    lse: Tensor,
    seed: Tensor,
    tables: list[Tensor] | None = None,
    *,
    trained: Sequence[int] = (),
    **options: Any,
) -> list[Tensor]:
    operands = [*rows, *columns, *(tables or [])]
    of_operands = [operands[i].new_empty(operands[i].shape) for i in trained]
    return [*(new_rows(x, x.shape[2], x.shape[3], query.dtype) for x in (query, key, value)), *of_operands]


# Query [B, H, s, D] at position i sees key [B, K, t, D] at position j iff nearest <= i - j <= farthest and the mask
# program allows it; rows, columns and tables are the program's operands. ``sinks`` [H] is one more logit for every
# query of a head, with no value; with ``softcap`` the scores of keys are ``softcap * tanh(scale * q k / softcap)``,
# before the mask. ``queries`` and ``keys`` are partitions that say which positions this rank's tensors hold, "" meaning
# all. Partitioned keys circulate. With ``explicit`` keys that are not partitioned are attended as the definition says,
# exact where every key of a row is masked by a large number; then there are no sinks. Results are out [B, H, s, E],
# lse [B, H, s] in float64, and the seed of dropout, 0 without.
ring_attention = communicating(
    "ring_attention(Tensor query, Tensor key, Tensor value, Tensor[] rows, Tensor[] columns, "
    f"Tensor? sinks=None, Tensor[]? tables=None, *, {_OPTIONS}) -> (Tensor out, Tensor lse, Tensor seed)",
    fake=_fake,
)(forward_steps)

# The gradients of query, key and value, then those of the program's operands whose indices are in ``trained``: what
# this rank's queries add to them. Only then blocks are computed by the reference kernel, which has the gradient of
# scores.
ring_attention_backward = communicating(
    "ring_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor[] rows, Tensor[] columns, "
    f"Tensor out, Tensor lse, Tensor seed, Tensor[]? tables=None, *, {_OPTIONS}, int[] trained=[]) -> Tensor[]",
    fake=_fake_backward,
)(backward_steps)


def _remember(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    query, key, value, rows, columns, sinks, tables = inputs
    out, lse, seed = output
    tables = tables or []
    ctx.counts, ctx.options = [len(rows), len(columns), len(tables)], keyword_only_inputs
    ctx.save_for_backward(query, key, value, sinks, *rows, *columns, *tables, out, lse, seed)
    # as aten does for the lse of its attention: asking for its gradient is an error
    ctx.mark_non_differentiable(lse, seed)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    num_given = len(ctx.needs_input_grad)  # the dispatcher drops sinks and tables, from the end, that are the default
    needed = (*ctx.needs_input_grad, *(False, None)[num_given - 5 :])
    trained = [i for i, is_needed in enumerate((*needed[3], *needed[4], *(needed[6] or []))) if is_needed]
    query, key, value, sinks, *operands, out, lse, seed = ctx.saved_tensors
    rows, columns, tables = _split(operands, ctx.counts)
    of_query, of_key, of_value, *found = torch.ops.sptransform.ring_attention_backward(
        grad, query, key, value, rows, columns, out, lse, seed, tables, **ctx.options, trained=trained
    )
    of_operands: list[Tensor | None] = [None] * len(operands)
    for i, x in zip(trained, found, strict=True):
        of_operands[i] = x
    of_rows, of_columns, of_tables = _split(of_operands, ctx.counts)
    of_sinks = grad_of_sinks(grad, out, lse, sinks) if needed[5] else None
    return (of_query, of_key, of_value, of_rows, of_columns, of_sinks, of_tables)[:num_given]


def _split(xs: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
    ends = [*accumulate(counts)]
    return [list(xs[end - count : end]) for end, count in zip(ends, counts, strict=True)]


torch.library.register_autograd("sptransform::ring_attention", _backward, setup_context=_remember, lib=LIBRARY)
