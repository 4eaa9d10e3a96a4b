"""How ops that read the rank run on ``LocalTensorMode``, torch's simulation of all ranks in one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Private, and the only simulation of ranks torch has; the tests that use it name it when it moves.
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode

from sptransform.ops.random import mask_for
from sptransform.ops.sharding import first_rank_for, place_for, take_for
from sptransform.placement import Shard

_PER_RANK: dict[str, Callable[..., Tensor]] = {
    "dropout_mask": lambda rank, x, p, group: mask_for(x, p, rank),
    "on_first_rank": lambda rank, x, group: first_rank_for(x, rank),
    "place": lambda rank, x, spec, group: place_for(x, Shard.parse(spec, part=x), rank),
    "take": lambda rank, x, spec, group: take_for(x, Shard.parse(spec, whole=x), rank),
}


@cache
def register() -> None:
    """Teach ``LocalTensorMode`` the ops of this package; further calls do nothing."""
    for name, per_rank in _PER_RANK.items():
        torch.library.register_torch_dispatch(f"sptransform::{name}", LocalTensorMode, _on_all_ranks(per_rank))


def _on_all_ranks(per_rank: Callable[..., Tensor]) -> Callable[..., Any]:
    def run(mode: LocalTensorMode, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        x, *rest = args
        parts = x._local_tensors if isinstance(x, LocalTensor) else dict.fromkeys(mode.ranks, x)
        return LocalTensor({rank: per_rank(rank, part, *rest) for rank, part in parts.items()})

    return run
