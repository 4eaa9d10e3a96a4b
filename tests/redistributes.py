"""What a change of placement must do to values and gradients, whoever runs the ranks.

:func:`check` gives every rank what the source placement says it holds of random tensors, runs the op, and compares
values with the target placement and gradients with both, by the table of :mod:`sptransform.placement`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import sptransform.ops  # noqa: F401 - registers the ops
from sptransform.ops.sharding import take_for
from sptransform.partition import Partition
from sptransform.placement import I, P, Placement, R, Shard
from tests.brute_force import randn, together, zigzag

PerRank = list[list[Tensor]]  # [rank][tensor]

# (op, its arguments after the tensors; the group's name is put where it says so)
Op = tuple[str, tuple[Any, ...]]
GROUP = object()
# name, arguments, inputs, cotangents -> outputs, gradients
Runner = Callable[[str, tuple[Any, ...], PerRank, PerRank], tuple[PerRank, PerRank]]

TAKES_LIST = ("all_to_all", "replicate")


@dataclass(frozen=True)
class Change:
    """Tensors of global ``shapes``, each from a source to a target placement, by one op."""

    shapes: tuple[tuple[int, ...], ...]
    sources: tuple[Placement, ...]
    targets: tuple[Placement, ...]

    def __str__(self) -> str:
        def spec(placement: Placement) -> str:
            return placement.spec if isinstance(placement, Shard) else str(placement)

        pairs = zip(self.sources, self.targets, strict=True)
        return ",".join(f"{spec(source)}->{spec(target)}" for source, target in pairs)

    @property
    def num_ranks(self) -> int:
        return next(p.partition.num_ranks for p in (*self.sources, *self.targets) if isinstance(p, Shard))

    def op(self, group: str) -> Op:
        source, target = self.sources[0], self.targets[0]
        match source, target:
            case Shard(), Shard():
                return "all_to_all", ([s.spec for s in self.sources], [t.spec for t in self.targets], group)
            case (_, Shard()) if source in (I, R):
                return "cut", (target.spec, group, source == I)
            case Shard(), _:
                return "gather", (source.spec, group, target == I)
            case _, Shard():
                return "sum_scatter", (target.spec, group)
        ops = {
            (I, P): ("first_rank", (group, True)),
            (I, R): ("replicate", (group,)),
            (P, I): ("sum", (group, True)),
            (P, R): ("sum", (group, False)),
            (R, I): ("first_rank", (group, False)),
        }
        return ops[source, target]


def change(shape: tuple[int, ...], source: Placement, target: Placement) -> Change:
    return Change((shape,), (source,), (target,))


def packed(*changes: Change) -> Change:
    """Several changes of one kind by one op."""
    return Change(*(tuple(getattr(c, name)[0] for c in changes) for name in ("shapes", "sources", "targets")))


def check(changed: Change, num_ranks: int, run: Runner) -> None:
    """Raise AssertionError where values or gradients are not those of the placements."""
    wholes = [randn(*shape) for shape in changed.shapes]
    held = [_held(x, source, num_ranks) for x, source in zip(wholes, changed.sources, strict=True)]
    cotangents = [
        [randn(*_local(target, shape, rank)) for rank in range(num_ranks)]
        for shape, target in zip(changed.shapes, changed.targets, strict=True)
    ]
    for index, target in enumerate(changed.targets):
        if target in (I, P):  # every rank holds the gradient
            cotangents[index] = [cotangents[index][0]] * num_ranks
    name, arguments = changed.op("group")
    outputs, grads = run(name, arguments, _by_rank(held), _by_rank(cotangents))
    for index, x in enumerate(wholes):
        source, target = changed.sources[index], changed.targets[index]
        _check_value([own[index] for own in outputs], x, target)
        gradient = _whole_gradient(cotangents[index], target)
        _check_gradient([own[index] for own in grads], gradient, source)


def _local(placement: Placement, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return placement.local_shape(shape, rank) if isinstance(placement, Shard) else shape


def _held(x: Tensor, placement: Placement, num_ranks: int) -> list[Tensor]:
    if isinstance(placement, Shard):
        return [take_for(x, placement, rank) for rank in range(num_ranks)]
    if placement == P:
        summands = [randn(*x.shape) for _ in range(num_ranks - 1)]
        return [*summands, x - sum(summands)]
    return [x] * num_ranks


def _whole_gradient(cotangents: list[Tensor], target: Placement) -> Tensor:
    return cotangents[0] if target in (I, P) else together(cotangents, target)


def _check_value(outputs: list[Tensor], x: Tensor, target: Placement) -> None:
    if target == P:
        torch.testing.assert_close(sum(outputs), x)
        return
    for rank, output in enumerate(outputs):
        torch.testing.assert_close(output, take_for(x, target, rank) if isinstance(target, Shard) else x)


def _check_gradient(grads: list[Tensor], gradient: Tensor, source: Placement) -> None:
    if source == R:
        torch.testing.assert_close(sum(grads), gradient)
        return
    for rank, grad in enumerate(grads):
        torch.testing.assert_close(grad, take_for(gradient, source, rank) if isinstance(source, Shard) else gradient)


def _by_rank(by_tensor: list[list[Tensor]]) -> PerRank:
    return [list(own) for own in zip(*by_tensor, strict=True)]


def apply(name: str, arguments: tuple[Any, ...], inputs: list[Tensor]) -> list[Tensor]:
    """The op on one rank's tensors, or on all ranks' in simulation."""
    group = dist.group.WORLD.group_name
    arguments = tuple(group if argument == "group" else argument for argument in arguments)
    op = getattr(torch.ops.sptransform, name)
    return list(op(inputs, *arguments)) if name in TAKES_LIST else [op(inputs[0], *arguments)]


# ---------------------------------------------------------------------------------------------------------------
# Changes that work the same on every rank, for 4 ranks; and those that do not, for 3.

_sequence = Shard(1, Partition.contiguous(8, 4))
_heads = Shard(2, Partition.contiguous(4, 4))
_few_heads = Shard(2, Partition.contiguous(4, 4).refine(1).quotient(2))  # two key heads, each on two ranks
_one_head = Shard(2, Partition.contiguous(4, 4).quotient(4))
_flat = Shard(0, Partition.contiguous(8, 4), outer=3)
_zigzag = Shard(1, zigzag(8, 4))

EVEN = [
    change((2, 8), I, R),
    change((2, 8), I, P),
    change((2, 8), R, I),
    change((2, 8), P, I),
    change((2, 8), P, R),
    *(
        change(shape, source, target)
        for shape, shard in (((2, 8, 3), _sequence), ((24, 2), _flat), ((2, 8), _zigzag), ((16,), Shard(0, Partition.contiguous(16, 4))))
        for source, target in ((I, shard), (R, shard), (shard, I), (shard, R), (P, shard))
    ),
    change((2, 8, 4, 3), _sequence, _heads),
    change((2, 8, 4, 3), _heads, _sequence),
    change((2, 8, 2, 3), _sequence, _few_heads),
    change((2, 8, 1, 3), _sequence, _one_head),
    change((2, 8, 4), _zigzag, _heads),
    change((2, 8, 4), _heads, _zigzag),
    change((24, 4), _flat, Shard(1, Partition.contiguous(4, 4))),
    change((2, 12), Shard(0, Partition.contiguous(2, 4).quotient(1)), Shard(1, Partition.contiguous(4, 4), outer=3))
    if False
    else change((4, 12), Shard(0, Partition.contiguous(4, 4)), Shard(1, Partition.contiguous(4, 4), outer=3)),
    change((24, 8), _flat, Shard(1, Partition.contiguous(4, 4), outer=2)),
    change((8, 24), Shard(0, Partition.contiguous(4, 4), outer=2), Shard(1, Partition.contiguous(8, 4), outer=3)),
    packed(
        change((2, 8, 4, 3), _sequence, _heads),
        change((2, 8, 2, 3), _sequence, _few_heads),
        change((2, 8, 8), _sequence, Shard(2, Partition.contiguous(8, 4))),
    ),
    packed(change((24, 4), _flat, Shard(1, Partition.contiguous(4, 4))), change((2, 8, 4), _zigzag, _heads)),
    packed(change((2, 3), I, R), change((4,), I, R), change((), I, R)),
]
