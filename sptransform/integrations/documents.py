"""Which document every token of a packed sequence belongs to. Where they end is data, so no graph depends on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def documents_of_positions(position_ids: Tensor, visible: Tensor | None = None) -> Tensor | None:
    """A number for each token, equal within a document; one begins where the position is not the last one plus 1.

    Beside padding a document begins at a visible token whose position is not beyond that of the last visible token, or
    goes on neither from that one nor from the token before: positions may count all tokens or the visible ones, and be
    anything where there is padding.

    Args:
        position_ids: [B or 1, S].
        visible: boolean [B, S], False for padding.

    Returns:
        [B or 1, S]; None where every row is known to be one document, which it is not while a graph is captured.
    """
    begins = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1
    if visible is not None:
        position_ids = position_ids.expand(visible.shape)
        tokens = torch.arange(visible.shape[1], device=visible.device)
        last = nn.functional.pad(torch.where(visible, tokens, -1).cummax(-1).values[:, :-1], (1, 0), value=-1)
        previous = position_ids.gather(1, last.clamp(min=0))
        is_beyond, follows = position_ids > previous, position_ids == previous + 1
        # the first factor is implied by the others; it shows where positions go on by one throughout
        begins = (begins.cumsum(-1) > 0) & visible & (last >= 0) & (~is_beyond | (begins & ~follows))
    if not torch.compiler.is_compiling() and not bool(begins.any()):
        return None
    return begins.cumsum(-1)


def documents_of_lengths(ends: Tensor, num_tokens: int) -> Tensor:
    """The same by the ends of documents: ``ends`` [documents + 1] begins with 0; returns [1, num_tokens]."""
    tokens = torch.arange(num_tokens, device=ends.device, dtype=ends.dtype)
    return torch.bucketize(tokens, ends, right=True)[None]
