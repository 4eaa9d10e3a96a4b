"""Attention of Transformers written densely: what ours is compared with where `sdpa` cannot compute it.

Importing this module registers `attn_implementation="dense"`. Its masks are those of Transformers' `sdpa`, all entries
computed. Documents count as users mean them: wherever position ids restart, whatever else is masked.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


def dense_mask(*args: Any, **kwargs: Any) -> Tensor:
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = attention_mask
    if position_ids is not None and query.shape[2] == key.shape[2]:
        visible = visible & _together(documents_of(position_ids))
    if cu_seq_lens_q is not None:
        sizes = cu_seq_lens_q.diff().tolist()
        visible = visible & _together(torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[None])
    scores = scores.masked_fill(~visible, -torch.inf)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = torch.ops.aten._safe_softmax(scores, -1)[..., : key.shape[2]]  # zeros where nothing is seen
    return (weights @ value).transpose(1, 2), None


def documents_of(position_ids: Tensor) -> Tensor:
    """A number for each document; token by token."""
    rows = position_ids.tolist()
    numbers = [[0] for _ in rows]
    for row, own in zip(rows, numbers, strict=True):
        for before, position in pairwise(row):
            own.append(own[-1] + (position != before + 1))
    return torch.tensor(numbers)


def _together(documents: Tensor) -> Tensor:
    return (documents[:, :, None] == documents[:, None, :])[:, None]


AttentionInterface.register("dense", dense_attention)
AttentionMaskInterface.register("dense", dense_mask)
