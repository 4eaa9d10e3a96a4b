"""Which document every token of a packed sequence belongs to. Where they end is data, so no graph depends on it."""

from __future__ import annotations

import torch
from torch import Tensor


def documents_of_positions(position_ids: Tensor) -> Tensor | None:
    """A number for each token, equal within a document; one begins where the position is not the last one plus 1.

    Args:
        position_ids: [B, S].

    Returns:
        [B, S]; None where every row is known to be one document, which it is not while a graph is captured.
    """
    begins = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1
    if not torch.compiler.is_compiling() and not bool(begins.any()):
        return None
    return begins.cumsum(-1)


def documents_of_lengths(ends: Tensor, num_tokens: int) -> Tensor:
    """The same by the ends of documents: ``ends`` [documents + 1] begins with 0; returns [1, num_tokens]."""
    tokens = torch.arange(num_tokens, device=ends.device, dtype=ends.dtype)
    return torch.bucketize(tokens, ends, right=True)[None]
