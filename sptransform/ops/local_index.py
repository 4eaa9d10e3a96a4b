"""Maps global to local indices, for a table that is cut along its rows, or logits along their classes."""

from __future__ import annotations

import torch
from torch import Tensor

from sptransform.ops.groups import rank_in
from sptransform.ops.library import primitive
from sptransform.sharding.partition import Partition


def local_index_for(index: Tensor, partition: Partition, rank: int) -> Tensor:
    """Positions of ``index`` in rank's part, -1 for indices that other ranks own.

    Raises:
        IndexError: no rank owns an index. On an accelerator an asynchronous assertion, as in torch's own lookups.
    """
    legal = ((index >= 0) & (index < partition.size)).all()
    if index.device.type == "cpu":
        if not legal:
            raise IndexError("index out of range in self")
    else:
        torch._assert_async(legal)
    found, at = torch.full_like(index, -1), 0
    for lo, hi in partition.owned[rank]:
        found = torch.where((index >= lo) & (index < hi), index - (lo - at), found)
        at += hi - lo
    return found


@primitive(
    "local_index(Tensor index, str partition, str group_name) -> Tensor",
    fake=lambda index, partition, group_name: torch.empty_like(index),
)
def local_index(index: Tensor, partition: str, group_name: str) -> Tensor:
    return local_index_for(index, Partition.parse(partition), rank_in(group_name))
