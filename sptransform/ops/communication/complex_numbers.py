"""Complex numbers on their way between ranks: as pairs of real ones, since not every backend sends others."""

from __future__ import annotations

import torch
from torch import Tensor


def as_sent(x: Tensor) -> Tensor:
    """``x``, contiguous and real: complex numbers have a further, last dimension of two parts."""
    return torch.view_as_real(x.resolve_conj()).contiguous() if x.is_complex() else x.contiguous()


def as_received(x: Tensor, is_complex: bool) -> Tensor:
    """The inverse, for what has arrived."""
    return torch.view_as_complex(x) if is_complex else x
