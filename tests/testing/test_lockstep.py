"""Ranks in lockstep end with whoever waits for them."""

from __future__ import annotations

import _thread

import pytest
import torch

from sptransform.sharding.mesh import PRETENDED_GROUP
from sptransform.testing.lockstep import in_lockstep


@pytest.mark.timeout(60)
def test_an_interrupt_ends_all_ranks() -> None:
    ended: list[int] = []

    def meet() -> None:
        torch.ops._c10d_functional.all_reduce(torch.ones(1), "sum", PRETENDED_GROUP)

    def run(rank: int) -> None:
        try:
            meet()
            if rank == 0:
                _thread.interrupt_main()
            while True:
                meet()
        finally:
            ended.append(rank)

    with pytest.raises(KeyboardInterrupt):
        in_lockstep(2, run)
    assert sorted(ended) == [0, 1]
