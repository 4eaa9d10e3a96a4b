"""Dropout of attention: which probabilities a block keeps, the same in the forward and in the backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sptransform.ops.groups import process
from sptransform.ops.library import primitive


def kept_of(p: float, state: int) -> Callable[[Tensor, int], Tensor]:
    """A function of probabilities and their first row: dropout's factors for them, 0 or 1 / (1 - p).

    Equal states, rows and shapes give equal factors.
    """

    def kept(probabilities: Tensor, start: int) -> Tensor:
        generator = torch.Generator(device=probabilities.device)
        generator.manual_seed((state + start * 0xBF58476D1CE4E5B9) % 2**63)
        drawn = torch.rand(probabilities.shape, device=probabilities.device, generator=generator)
        return (drawn >= p).to(probabilities.dtype) * (1 / (1 - p) if p < 1 else 0.0)

    return kept


def _fake_seed(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.int64)


@primitive("dropout_seed(Tensor like) -> Tensor", fake=_fake_seed, tags=(torch.Tag.nondeterministic_seeded,))
def dropout_seed(like: Tensor) -> Tensor:
    """A dropout seed, different on every process.

    It draws one number for any shape, so the generators of ranks with equal seeds stay in step.
    """
    drawn = torch.randint(2**62, (), device=like.device)
    # of the process, since ranks of other groups have other heads or another batch and need other masks
    return drawn ^ (process() * 0x9E3779B97F4A7C15 % 2**62)
