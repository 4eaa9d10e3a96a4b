"""Dropout masks that differ between ranks while the ranks' default generators stay in step."""

from __future__ import annotations

import torch
from torch import Tensor

from sptransform.ops.groups import rank_in
from sptransform.ops.library import primitive


def mask_for(x: Tensor, p: float, rank: int) -> Tensor:
    """Boolean mask of x's shape, True with probability ``1 - p``. ``rank`` is any number unique to the rank.

    The default generator draws one number, whatever the shape. So ranks with the same seed stay in step, and a
    replicated dropout elsewhere draws the same mask on all of them.
    """
    # use the generator of x's device: it is the one that recomputing a checkpointed region rewinds
    seed = int(torch.randint(2**62, (), device=x.device).item())
    generator = torch.Generator(device=x.device)
    generator.manual_seed((seed + rank * 0x9E3779B97F4A7C15) % 2**63)
    return torch.rand(x.shape, device=x.device, generator=generator) >= p


def _fake_mask(x: Tensor, p: float, group_name: str) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.bool)


@primitive(
    "dropout_mask(Tensor x, float p, str group_name) -> Tensor",
    fake=_fake_mask,
    tags=(torch.Tag.nondeterministic_seeded,),
)
def dropout_mask(x: Tensor, p: float, group_name: str) -> Tensor:
    """With several mesh dims, ``group_name`` lists the group of each, separated by commas."""
    number = 0
    for group in group_name.split(","):
        number = number << 20 | rank_in(group)
    return mask_for(x, p, number)
