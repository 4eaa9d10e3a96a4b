"""Attention on one rank's heads, for cases that the plain op cannot express."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from sptransform.ops.library import composite
from sptransform.ops.ring.kernels.interface import compute_dtype


@composite(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float dropout_p, bool is_causal, "
    "Tensor? sinks=None, *, float? scale=None, float softcap=0.0, int[] key_head_of=[], str group_name='', "
    "bool explicit=False) -> Tensor"
)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    sinks: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    key_head_of: list[int] = (),
    group_name: str = "",
    explicit: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` that repeats key heads locally, so that they are sent un-repeated.

    Query head i reads key head ``key_head_of[i]`` (head i if the list is empty). With ``group_name``, dropout draws
    this rank's own mask. Fused kernels would draw the same mask on ranks with the same seed, so the probabilities are
    then computed explicitly; so they are with ``explicit``. A rank without heads runs no kernel: some kernels end the
    process on empty input.

    With ``softcap``, scores are ``softcap * tanh(score / softcap)`` before the mask. ``sinks`` [H] are one more logit
    for every query of a head, with no value. Fused kernels have neither. This is the definition of both, kept as the
    form that passes match; ``AttendByPosition`` puts ``ring_attention`` in its place under every strategy where it can,
    which is as exact and makes no tensor of queries x keys.
    """
    if key_head_of:
        key, value = _repeat(key, key_head_of), _repeat(value, key_head_of)
    explicit = explicit or softcap != 0.0 or sinks is not None
    is_empty = 0 in query.shape
    is_learned = sinks is not None or (attn_mask is not None and attn_mask.requires_grad)
    if is_empty and not is_learned:
        return query @ key.transpose(-2, -1) @ value
    explicit = explicit or is_empty  # every learned operand must have a gradient: other ranks wait for it
    if not explicit and (dropout_p == 0.0 or not group_name):
        return functional.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    # kernels sum up in float32 too: scores may be beyond the range of 16 bits, and masks need more digits
    dtype, output_dtype = compute_dtype(query.dtype), query.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    if sinks is not None:
        columns = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, columns], -1)
    # a fully masked row gives zeros, as in torch's op
    probabilities = torch.ops.aten._safe_softmax(scores, -1)[..., : key.shape[2]]
    if dropout_p == 0.0 or not group_name:
        return (functional.dropout(probabilities, dropout_p) @ value).to(output_dtype)
    mask = torch.ops.sptransform.dropout_mask(probabilities, dropout_p, group_name)
    return ((probabilities * mask / (1 - dropout_p)) @ value).to(output_dtype)


def _repeat(x: Tensor, head_of: list[int]) -> Tensor:
    """Heads of ``x`` in the order ``head_of``; runs of the same head are expanded."""
    num_heads = x.shape[1]
    times, rest = divmod(len(head_of), num_heads) if num_heads else (0, 0)
    if not rest and list(head_of) == [i // times for i in range(len(head_of))]:
        if times == 1:
            return x
        return x.unsqueeze(2).expand(-1, -1, times, -1, -1).reshape(x.shape[0], len(head_of), *x.shape[2:])
    runs: list[list[int]] = []
    for head in head_of:
        if runs and runs[-1][0] == head:
            runs[-1][1] += 1
        else:
            runs.append([head, 1])
    return torch.cat([x.narrow(1, head, 1).expand(-1, count, -1, -1) for head, count in runs], 1)
