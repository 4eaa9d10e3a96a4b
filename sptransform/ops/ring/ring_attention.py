"""The op ``ring_attention`` and its backward: attention whose queries and keys are sharded over the ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sptransform.ops.communication.steps import communicating
from sptransform.ops.library import LIBRARY
from sptransform.ops.ring.blocks import new_rows
from sptransform.ops.ring.kernels.interface import compute_dtype
from sptransform.ops.ring.merging import grad_of_sinks
from sptransform.ops.ring.schedule import backward_steps, forward_steps

_OPTIONS = (
    "str mask='', int? nearest=None, int? farthest=None, float dropout_p=0.0, float? scale=None, "
    "float softcap=0.0, int[] key_head_of=[], bool explicit=False, str queries='', str keys='', str group_name=''"
)


def _fake(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any):
    out = new_rows(query, query.shape[2], value.shape[3], query.dtype)
    lse = query.new_empty(query.shape[:3], dtype=compute_dtype(query.dtype))
    return out, lse, query.new_empty((), dtype=torch.int64)


def _fake_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any):
    return tuple(new_rows(x, x.shape[2], x.shape[3], query.dtype) for x in (query, key, value))


# Query [B, H, s, D] at position i sees key [B, K, t, D] at position j iff nearest <= i - j <= farthest and the mask
# program allows it; rows and columns are the program's operands. ``sinks`` [H] is one more logit for every query of a
# head, with no value; with ``softcap`` the scores of keys are ``softcap * tanh(scale * q k / softcap)``, before the
# mask. ``queries`` and ``keys`` are partitions that say which positions this rank's tensors hold, "" meaning all.
# Partitioned keys circulate. With ``explicit`` keys that are not partitioned are attended as the definition says, exact
# where every key of a row is masked by a large number; then there are no sinks. Results
# are out [B, H, s, E], lse [B, H, s], and the dropout seed (0 without dropout).
ring_attention = communicating(
    "ring_attention(Tensor query, Tensor key, Tensor value, Tensor[] rows, Tensor[] columns, "
    f"Tensor? sinks=None, *, {_OPTIONS}) -> (Tensor out, Tensor lse, Tensor seed)",
    fake=_fake,
)(forward_steps)

ring_attention_backward = communicating(
    "ring_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor[] rows, Tensor[] columns, "
    f"Tensor out, Tensor lse, Tensor seed, *, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)(backward_steps)


def _remember(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    query, key, value, rows, columns, sinks = inputs
    out, lse, seed = output
    ctx.num_rows, ctx.num_columns, ctx.options = len(rows), len(columns), keyword_only_inputs
    ctx.save_for_backward(query, key, value, sinks, *rows, *columns, out, lse, seed)
    # as aten does for the lse of its attention: asking for its gradient is an error
    ctx.mark_non_differentiable(lse, seed)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    if any(ctx.needs_input_grad[3]) or any(ctx.needs_input_grad[4]):
        raise NotImplementedError("ring_attention gives no gradient to the operands of its mask: detach them")
    query, key, value, sinks, *operands, out, lse, seed = ctx.saved_tensors
    rows, columns = operands[: ctx.num_rows], operands[ctx.num_rows :]
    grads = torch.ops.sptransform.ring_attention_backward(
        grad, query, key, value, rows, columns, out, lse, seed, **ctx.options
    )
    operand_grads = *grads, [None] * ctx.num_rows, [None] * ctx.num_columns
    if sinks is None:  # then it is no input either: the dispatcher drops arguments that are the default
        return operand_grads
    return *operand_grads, grad_of_sinks(grad, out, lse, sinks) if ctx.needs_input_grad[5] else None


torch.library.register_autograd("sptransform::ring_attention", _backward, setup_context=_remember, lib=LIBRARY)
