"""How ops that read the rank run on ``LocalTensorMode``, torch's simulation of all ranks in one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

# Private, but torch's only simulation of ranks. If it moves, the tests that use it fail on this import.
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode
from torch.distributed._local_tensor._c10d import _prepare_collective_groups
from torch.utils import _pytree as pytree

from sptransform.ops.communication.steps import COMMUNICATING, Steps, group_of, perform_together
from sptransform.ops.dropout_mask import mask_for
from sptransform.ops.local_index import local_index_for
from sptransform.ops.local_slice import embed_for, first_rank_for, local_slice_for
from sptransform.sharding.partition import Partition
from sptransform.sharding.placement import Shard

_PER_RANK: dict[str, Callable[..., Tensor]] = {
    "dropout_mask": lambda rank, x, p, group: mask_for(x, p, rank),
    "local_index": lambda rank, x, partition, group: local_index_for(x, Partition.parse(partition), rank),
    "on_first_rank": lambda rank, x, group: first_rank_for(x, rank),
    "embed_in_zeros": lambda rank, x, spec, group: embed_for(x, Shard.parse(spec, part=x), rank),
    "local_slice": lambda rank, x, spec, group: local_slice_for(x, Shard.parse(spec, full=x), rank),
}


@cache
def register() -> None:
    """Teach ``LocalTensorMode`` the ops of this package; further calls do nothing."""
    rules = {name: _on_all_ranks(per_rank) for name, per_rank in _PER_RANK.items()}
    rules |= {name: _on_all_ranks_together(name, steps) for name, steps in COMMUNICATING.items()}
    for name, rule in rules.items():
        torch.library.register_torch_dispatch(f"sptransform::{name}", LocalTensorMode, rule)


def _groups(mode: LocalTensorMode, name: str) -> list[list[int]]:
    """All ranks, group by group: the group called ``name`` and its shifted copies."""
    if not name:
        return [[rank] for rank in sorted(mode.ranks)]
    # until torch 2.14 it gives a third one, which is not needed
    members, offsets, *_ = _prepare_collective_groups(distributed_c10d._resolve_process_group(name))
    return [[offset + member for member in members] for offset in offsets]


def _on_all_ranks(per_rank: Callable[..., Tensor]) -> Callable[..., Any]:
    def run(mode: LocalTensorMode, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        x, *rest = args
        parts = x._local_tensors if isinstance(x, LocalTensor) else dict.fromkeys(mode.ranks, x)
        numbers = dict.fromkeys(parts, 0)
        for name in rest[-1].split(","):  # several mesh dims: one number for each combination of ranks
            for group in _groups(mode, name):
                numbers |= {rank: numbers[rank] << 20 | at for at, rank in enumerate(group)}
        return LocalTensor({rank: per_rank(numbers[rank], part, *rest) for rank, part in parts.items()})

    return run


def _on_all_ranks_together(name: str, steps: Callable[..., Steps[Any]]) -> Callable[..., Any]:
    def run(mode: LocalTensorMode, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}

        def of(rank: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
            """The rank's local arguments; a plain tensor is the same on all ranks."""
            return pytree.tree_map_only(LocalTensor, lambda x: x._local_tensors[rank], (args, kwargs))

        results: dict[int, Any] = {}
        for group in _groups(mode, group_of(name, args, kwargs)):
            own = {at: of(rank) for at, rank in enumerate(group)}
            found = perform_together({at: steps(at, *own_args, **rest) for at, (own_args, rest) in own.items()})
            results |= {rank: found[at] for at, rank in enumerate(group)}
        flat = {rank: pytree.tree_flatten(result) for rank, result in results.items()}
        spec = flat[0][1]
        merged = [LocalTensor({rank: leaves[i] for rank, (leaves, _) in flat.items()}) for i in range(spec.num_leaves)]
        return pytree.tree_unflatten(merged, spec)

    return run
