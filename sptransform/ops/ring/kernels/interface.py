"""What every block kernel has in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Grads = tuple[Tensor, Tensor, Tensor]


def rows_in_memory(x: Tensor) -> Tensor:
    """``x``, copied where a row does not lie in one piece: kernels take that for granted, and do not check it."""
    return x if x.stride(-1) == 1 else x.contiguous()


@dataclass(frozen=True)
class Case:
    """What the choice of a kernel depends on."""

    device: str
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    masked: bool
    dropout: bool

    @staticmethod
    def of(query: Tensor, value: Tensor, *, masked: bool, dropout_p: float) -> Case:
        return Case(query.device.type, query.dtype, query.shape[-1], value.shape[-1], masked, dropout_p > 0)


@dataclass(frozen=True)
class Kernel:
    """``grouped`` is whether it reads K < H key heads as they are; if not, it gets them repeated."""

    name: str
    serves: Callable[[Case], bool]
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Grads]
    grouped: bool = True


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which results of blocks are put together."""
    return torch.float64 if dtype == torch.float64 else torch.float32
