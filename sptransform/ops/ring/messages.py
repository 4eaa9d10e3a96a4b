"""Messages of a ring: keys and values, or their gradients, in one 1-D tensor.

All keys come first, then all values, each as ``[B, t, K, D]``. They are read and updated in the message without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from sptransform.ops.library import primitive
from sptransform.ops.ring.blocks import add_block_


def _fake_pack(key: Tensor, value: Tensor) -> Tensor:
    return key.new_empty(key.numel() + value.numel())


@primitive("pack_block(Tensor key, Tensor value) -> Tensor", fake=_fake_pack)
def pack_block(key: Tensor, value: Tensor) -> Tensor:
    """key [B, K, t, D] and value [B, K, t, E] as a message."""
    return torch.cat([x.transpose(1, 2).reshape(-1) for x in (key, value)])


def unpack(message: Tensor, key_shape: Sequence[int], value_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The packed keys and values, as views of the message."""
    parts = message.split([prod(key_shape), prod(value_shape)])
    shapes = ((batch, size, heads, dim) for batch, heads, size, dim in (key_shape, value_shape))
    key, value = (part.view(shape).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True))
    return key, value


def add_to_message_(message: Tensor, key: Tensor, value: Tensor, start: int) -> None:
    """:func:`add_to_message` in place."""
    if key.numel() + value.numel() == 0:
        return
    batch, heads, _, key_dim = key.shape
    size = message.numel() // (batch * heads * (key_dim + value.shape[3]))
    shapes = ((batch, heads, size, x.shape[3]) for x in (key, value))
    for total, x in zip(unpack(message, *shapes), (key, value), strict=True):
        add_block_(total, x, start)


@primitive(
    "add_to_message(Tensor message, Tensor key, Tensor value, int start) -> Tensor",
    fake=lambda message, key, value, start: torch.empty_like(message),
)
def add_to_message(message: Tensor, key: Tensor, value: Tensor, start: int) -> Tensor:
    """The message plus gradients of keys [B, K, .., D] and values [B, K, .., E] from the ``start``-th on."""
    message = message.clone()
    add_to_message_(message, key, value, start)
    return message
