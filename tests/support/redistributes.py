"""What a change of placement must do to values and gradients, whoever runs the ranks.

:func:`check` gives every rank what the source placement says it holds of random tensors, runs the op, and compares
values with the target placement and gradients with both, by the table of :mod:`sptransform.sharding.placement`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import sptransform.ops  # noqa: F401 - registers the ops
from sptransform.ops.local_slice import local_slice_for
from sptransform.sharding.partition import Partition
from sptransform.sharding.placement import I, P, Placement, R, Shard
from tests.support.brute_force import randn, together

PerRank = list[list[Tensor]]  # [rank][tensor]

# the op, and its arguments after the tensors, with "group" for the group's name
Op = tuple[str, tuple[Any, ...]]
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

    def op(self) -> Op:
        """The op that does it."""
        source, target = self.sources[0], self.targets[0]
        match source, target:
            case Shard(), Shard() if source.dim == target.dim:
                return "repartition", (source.spec, target.spec, "group")
            case Shard(), Shard():
                return "all_to_all", ([s.spec for s in self.sources], [t.spec for t in self.targets], "group")
            case (_, Shard()) if source in (I, R):
                return "slice", (target.spec, "group", source == I)
            case Shard(), _:
                return "all_gather", (source.spec, "group", target == I)
            case _, Shard():
                return "reduce_scatter", (target.spec, "group")
        ops = {
            (I, P): ("first_rank", ("group", True)),
            (I, R): ("replicate", ("group",)),
            (P, I): ("all_reduce", ("group", True)),
            (P, R): ("all_reduce", ("group", False)),
            (R, I): ("first_rank", ("group", False)),
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
    name, arguments = changed.op()
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
        return [local_slice_for(x, placement, rank) for rank in range(num_ranks)]
    if placement == P:
        summands = [randn(*x.shape) for _ in range(num_ranks - 1)]
        return [*summands, x - sum(summands)]
    return [x] * num_ranks


def _whole_gradient(cotangents: list[Tensor], target: Placement) -> Tensor:
    return cotangents[0] if target in (I, P) else together(cotangents, target)


def _by_rank(by_tensor: list[list[Tensor]]) -> PerRank:
    return [list(own) for own in zip(*by_tensor, strict=True)]


def _check_value(outputs: list[Tensor], x: Tensor, target: Placement) -> None:
    if target == P:
        torch.testing.assert_close(sum(outputs), x)
        return
    for rank, output in enumerate(outputs):
        torch.testing.assert_close(output, local_slice_for(x, target, rank) if isinstance(target, Shard) else x)


def _check_gradient(grads: list[Tensor], gradient: Tensor, source: Placement) -> None:
    if source == R:
        torch.testing.assert_close(sum(grads), gradient)
        return
    for rank, grad in enumerate(grads):
        expected = local_slice_for(gradient, source, rank) if isinstance(source, Shard) else gradient
        torch.testing.assert_close(grad, expected)


def apply(name: str, arguments: tuple[Any, ...], inputs: list[Tensor]) -> list[Tensor]:
    """The op on one rank's tensors, or on all ranks' in simulation."""
    group = dist.group.WORLD.group_name
    arguments = tuple(group if argument == "group" else argument for argument in arguments)
    op = getattr(torch.ops.sptransform, name)
    return list(op(inputs, *arguments)) if name in TAKES_LIST else [op(inputs[0], *arguments)]


# ---------------------------------------------------------------------------------------------------------------
# What to try: changes in which every rank does the same, over 4 ranks; and others, over 3.


def _contiguous(dim: int, size: int, num_ranks: int, outer: int = 1) -> Shard:
    return Shard(dim, Partition.contiguous(size, num_ranks), outer)


def _balanced(dim: int, size: int, num_ranks: int) -> Shard:
    return Shard(dim, Partition.balanced(size, num_ranks))


def _zigzag(dim: int, size: int, num_ranks: int, outer: int = 1) -> Shard:
    return Shard(dim, Partition.zigzag(size, num_ranks), outer)


def _striped(dim: int, size: int, num_ranks: int, block: int, outer: int = 1) -> Shard:
    return Shard(dim, Partition.striped(size, num_ranks, block), outer)


def _to_and_from(shape: tuple[int, ...], shard: Shard) -> list[Change]:
    pairs = ((I, shard), (R, shard), (shard, I), (shard, R), (P, shard))
    return [change(shape, source, target) for source, target in pairs]


def _both_ways(shape: tuple[int, ...], one: Shard, other: Shard) -> list[Change]:
    return [change(shape, one, other), change(shape, other, one)]


_sequence, _heads, _folded = _contiguous(1, 8, 4), _contiguous(2, 4, 4), _zigzag(1, 16, 4)
_flat, _flat_folded = _contiguous(0, 8, 4, outer=3), _zigzag(0, 8, 4, outer=3)
# equally many indices a rank, in chunks that are not equal
_twelve = _zigzag(1, 12, 4)
# whole rounds of blocks, and a shorter one after them
_dealt, _left = _striped(1, 16, 4, 2), _striped(1, 12, 4, 2)
# two key heads of four query heads, and one of four: each on the ranks that need it
_two_keys, _one_key = (Shard(2, Partition.contiguous(4, 4).quotient(group)) for group in (2, 4))

EVEN = [
    change((2, 8), I, R),
    change((2, 8), I, P),
    change((2, 8), R, I),
    change((2, 8), P, I),
    change((2, 8), P, R),
    packed(change((2, 3), I, R), change((4,), I, R), change((), I, R)),
    *_to_and_from((2, 8, 3), _sequence),
    *_to_and_from((16,), _contiguous(0, 16, 4)),
    *_to_and_from((24, 2), _flat),
    *_to_and_from((2, 8), _zigzag(1, 8, 4)),
    *_to_and_from((2, 16, 3), _folded),
    *_to_and_from((24, 2), _flat_folded),
    *_to_and_from((2, 12), _twelve),
    *_to_and_from((2, 16, 3), _dealt),
    *_to_and_from((24, 2), _striped(0, 12, 4, 2, outer=2)),
    *_both_ways((2, 16, 4, 3), _dealt, _heads),
    *_both_ways((2, 12, 4), _left, _heads),
    *_both_ways((2, 12), _left, _contiguous(1, 12, 4)),
    *_both_ways((2, 8, 4, 3), _sequence, _heads),
    *_both_ways((2, 8, 4), _zigzag(1, 8, 4), _heads),
    *_both_ways((2, 16, 4, 3), _folded, _heads),
    *_both_ways((2, 12, 4), _twelve, _heads),
    *_both_ways((16, 2, 8), _zigzag(0, 16, 4), _zigzag(2, 8, 4)),
    *_both_ways((24, 4), _flat, _contiguous(1, 4, 4)),
    *_both_ways((24, 8), _flat, _contiguous(1, 4, 4, outer=2)),
    *_both_ways((24, 8), _flat_folded, _contiguous(1, 4, 4, outer=2)),
    *_both_ways((2, 16, 3), _folded, _contiguous(1, 16, 4)),
    *_both_ways((24, 2), _flat_folded, _flat),
    *_both_ways((2, 12), _twelve, _contiguous(1, 12, 4)),
    change((2, 8, 2, 3), _sequence, _two_keys),
    change((2, 8, 1, 3), _sequence, _one_key),
    change((24, 2), _flat, Shard(1, _two_keys.partition)),
    change((2, 16, 2), _folded, _two_keys),
    packed(
        change((2, 8, 4, 3), _sequence, _heads),
        change((2, 8, 2, 3), _sequence, _two_keys),
        change((2, 8, 8), _sequence, _contiguous(2, 8, 4)),
    ),
    packed(change((24, 4), _flat, _contiguous(1, 4, 4)), change((2, 8, 4), _zigzag(1, 8, 4), _heads)),
]

_uneven, _empty = _contiguous(1, 7, 3), _contiguous(1, 4, 3)
_five = _balanced(2, 5, 3)
_shared_key = Shard(2, Partition.balanced(4, 3).quotient(2))  # the first two ranks read the same key head

UNEVEN = [
    *_to_and_from((2, 7, 2), _uneven),
    *_to_and_from((2, 4), _empty),
    *_to_and_from((14, 2), _contiguous(0, 7, 3, outer=2)),
    *_to_and_from((2, 8), _zigzag(1, 8, 3)),
    *_to_and_from((2, 2), _zigzag(1, 2, 3)),
    *_both_ways((2, 7, 5), _uneven, _five),
    *_both_ways((2, 6, 5), _contiguous(1, 6, 3), _five),
    *_both_ways((2, 4, 5), _empty, _five),
    *_both_ways((14, 10), _contiguous(0, 7, 3, outer=2), _contiguous(1, 5, 3, outer=2)),
    *_both_ways((2, 7, 5), _zigzag(1, 7, 3), _five),
    *_both_ways((2, 7), _zigzag(1, 7, 3), _uneven),
    *_to_and_from((2, 8, 2), _striped(1, 8, 3, 2)),
    *_both_ways((2, 7), _striped(1, 7, 3, 1), _uneven),
    *_both_ways((2, 8, 5), _striped(1, 8, 3, 2), _five),
    *_both_ways((14, 2), _zigzag(0, 7, 3, outer=2), _contiguous(0, 7, 3, outer=2)),
    *_both_ways((2, 4), _empty, _zigzag(1, 4, 3)),
    change((6, 2), Shard(0, Partition.contiguous(7, 3).slice(1, 7)), _contiguous(0, 6, 3)),
    change((2, 7, 2, 3), _uneven, _shared_key),
    change((2, 6, 1), _contiguous(1, 6, 3), Shard(2, Partition.contiguous(3, 3).quotient(3))),
    packed(
        change((2, 7, 4), _uneven, _balanced(2, 4, 3)),
        change((2, 7, 2), _uneven, _shared_key),
        change((2, 7, 6), _uneven, _contiguous(2, 6, 3)),
    ),
]
