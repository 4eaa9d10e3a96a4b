"""All ranks of a group in one process: torch's LocalTensorMode over a process group that moves nothing.

    with simulate(4):
        shards = to_ranks(torch.ones(8), 4)              # or LocalTensor({rank: tensor}) for unequal values
        result = per_rank(run(shards))                   # one plain tensor for each rank

Inside, an op on a LocalTensor runs once for each rank and a functional collective moves data between the
ranks' values; autograd works. What to know:

- `dist.get_rank()` is 0 throughout: read the rank only in ops that know of this mode.
- An op of ours that communicates or reads the rank needs `torch.library.register_torch_dispatch(op,
  LocalTensorMode, rule)`. Without it each rank is alone in a group that moves nothing: values are wrong, and
  nothing says so.
- A plain tensor beside a LocalTensor has the same value on all ranks, and a factory such as `torch.zeros`
  makes a LocalTensor. A collective of a plain tensor is not simulated: pass it `to_ranks(tensor, num_ranks)`.
- `all_to_all_single` ignores its output splits: wrong ones pass here and hang or abort on real ranks.
- Print outside the block: printing makes tensors, which become LocalTensors too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def simulate(num_ranks: int) -> Iterator[LocalTensorMode]:
    """Simulate `num_ranks` ranks over a fake default group, which ends with the block if it began with it."""
    started_here = not dist.is_initialized()
    if started_here:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    if dist.get_world_size() != num_ranks:
        raise ValueError(f"the default group has {dist.get_world_size()} ranks, {num_ranks} were asked for")
    try:
        with LocalTensorMode(num_ranks) as mode:
            yield mode
    finally:
        if started_here:
            dist.destroy_process_group()


def to_ranks(tensor: torch.Tensor, num_ranks: int, *, requires_grad: bool = False) -> LocalTensor:
    """The same value on every rank, each its own copy."""
    return from_ranks(lambda rank: tensor, num_ranks, requires_grad=requires_grad)


def from_ranks(
    value: Callable[[int], torch.Tensor], num_ranks: int, *, requires_grad: bool = False
) -> LocalTensor:
    """`value(rank)` on each rank."""
    values = {rank: value(rank).detach().clone() for rank in range(num_ranks)}
    return LocalTensor(values, requires_grad=requires_grad)


def per_rank(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Each rank's value of a LocalTensor, in rank order, as copies without autograd history."""
    if not isinstance(tensor, LocalTensor):
        raise TypeError(f"a LocalTensor was expected: {type(tensor).__name__} is the same on all ranks")
    return [tensor._local_tensors[rank].detach().clone() for rank in sorted(tensor._local_tensors)]
