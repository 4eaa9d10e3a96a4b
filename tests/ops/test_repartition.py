"""The op that gives the indices of an axis other owners: what it sends, its transpose, and what it refuses."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from sptransform.engine.traffic import count_collectives
from sptransform.graph import notes
from sptransform.graph.redistribute import insert_redistribute
from sptransform.ops.communication.steps import perform_together
from sptransform.ops.groups import pretend
from sptransform.ops.local_slice import embed_for, local_slice_for
from sptransform.ops.repartition import repartition
from sptransform.sharding.mesh import PRETENDED_GROUP, Mesh
from sptransform.sharding.partition import Partition
from sptransform.sharding.placement import Shard
from sptransform.testing.lockstep import in_lockstep
from tests.sharding.test_partition import exact_partitions, indices
from tests.support.brute_force import randn
from tests.support.gloo_pool import get_pool

pytestmark = pytest.mark.timeout(120)

_sp = torch.ops.sptransform


@st.composite
def changes(draw: st.DrawFn) -> tuple[Shard, Shard]:
    """Two ways to own one axis, ranks that store their intervals in any order among them."""
    source = draw(exact_partitions())
    size, num_ranks = source.size, source.num_ranks
    source = Partition.of(size, [draw(st.permutations(own)) for own in source.owned])
    regular = [form(size, num_ranks) for form in (Partition.contiguous, Partition.zigzag)]
    ends = [source, draw(st.sampled_from(regular) | exact_partitions(size=size, num_ranks=num_ranks))]
    if draw(st.booleans()):
        ends[1] = with_halo(ends[1], draw(st.integers(1, 3)))
    if draw(st.booleans()):
        ends.reverse()
    dim, outer = draw(st.integers(0, 2)), draw(st.integers(1, 3))
    return Shard(dim, ends[0], outer), Shard(dim, ends[1], outer)


def with_halo(partition: Partition, rows: int) -> Partition:
    """Every rank also has the indices next to its own, in ascending order."""

    def near(rank: int) -> set[int]:
        return {i + step for i in indices(partition, rank) for step in range(-rows, rows + 1)}

    ranks = range(partition.num_ranks)
    return Partition.of(
        partition.size, ([(i, i + 1) for i in sorted(near(rank)) if 0 <= i < partition.size] for rank in ranks)
    )


def whole_of(shard: Shard) -> Tensor:
    shape = [2, 3, 1]
    shape[shard.dim] = shard.dim_size
    return randn(*shape)


def counted(source: Shard, target: Shard, x: Tensor, rank: int) -> list[int]:
    """Bytes that a graph which moves ``x`` is said to send from the rank, forward and backward."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    node.meta["val"] = x
    notes.note(node).differentiable = True
    output = graph.output(node)
    (moved,) = insert_redistribute(output, [node], [(source, target)])
    output.args = (moved,)
    return [c.bytes_sent for c in count_collectives(graph, Mesh.pretended(source.partition.num_ranks, rank))]


@given(changes())
@settings(deadline=None, derandomize=True, max_examples=150)
def test_every_index_comes_to_its_new_owners_and_only_those_travel(ends: tuple[Shard, Shard]) -> None:
    source, target = ends
    x = whole_of(source)
    ranks = range(source.partition.num_ranks)

    def steps(rank: int) -> object:
        return repartition(rank, local_slice_for(x, source, rank), source.spec, target.spec, "")

    results = perform_together({rank: steps(rank) for rank in ranks})
    before, after = ([set(indices(end.partition, rank)) for rank in ranks] for end in ends)
    entry = x.numel() // source.partition.size
    # of an index that ranks share, what they have is summed
    owners = sum(embed_for(torch.ones_like(local_slice_for(x, source, rank)), source, rank) for rank in ranks)
    for rank in ranks:
        torch.testing.assert_close(results[rank], local_slice_for(x * owners, target, rank))
        start = next(steps(rank))
        assert start.sent == [entry * len(before[rank] & own) * (to != rank) for to, own in enumerate(after)]
        assert start.received == [entry * len(own & after[rank]) * (by != rank) for by, own in enumerate(before)]
        away = [x.element_size() * sum(sizes) for sizes in (start.sent, start.received)]
        assert counted(source, target, x, rank) == away


@pytest.mark.parametrize("partition", [Partition.contiguous(4, 2), Partition.zigzag(8, 2), Partition.contiguous(5, 3)])
def test_a_flattened_axis_becomes_chunks_of_its_dimension(partition: Partition) -> None:
    """And back, which is the gradient's way."""
    flattened = Shard(1, partition, outer=3)
    chunks = Shard(1, Partition.contiguous(flattened.dim_size, partition.num_ranks))
    x = whole_of(flattened)
    for source, target in ((flattened, chunks), (chunks, flattened)):
        found = perform_together(
            {
                rank: repartition(rank, local_slice_for(x, source, rank), source.spec, target.spec, "")
                for rank in range(partition.num_ranks)
            }
        )
        for rank, part in found.items():
            assert torch.equal(part, local_slice_for(x, target, rank))


FOLDED, BLOCKS = Shard(1, Partition.zigzag(8, 2)), Shard(1, Partition.contiguous(8, 2))
ODD, UNEVEN = Shard(0, Partition.zigzag(7, 2), outer=2), Shard(0, Partition.contiguous(7, 2), outer=2)


def there_and_whole(x: Tensor, *, source: Shard, target: Shard, group: str) -> Tensor:
    """The identity, by way of both shards; every rank holds the value and the gradient."""
    part = _sp.repartition(_sp.slice(x, source.spec, group, True), source.spec, target.spec, group)
    return _sp.all_gather(part, target.spec, group, True)


@pytest.mark.parametrize(("source", "target"), [(FOLDED, BLOCKS), (ODD, UNEVEN), (UNEVEN, ODD)], ids=str)
def test_gradients(source: Shard, target: Shard) -> None:
    x = whole_of(source).requires_grad_()
    f = partial(there_and_whole, source=source, target=target, group=PRETENDED_GROUP)

    def on_rank(rank: int) -> Tensor:
        own = x.detach().clone().requires_grad_()
        assert torch.autograd.gradcheck(f, [own])
        return f(own).detach()

    for value in in_lockstep(2, on_rank):
        assert torch.equal(value, x.detach())


def opcheck_on_rank(rank: int, world_size: int, source: Shard, target: Shard) -> None:
    group = dist.group.WORLD.group_name
    for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.bool):
        shape = whole_of(source).shape  # the same values on all ranks, whatever random numbers they drew
        x = torch.arange(shape.numel()).remainder(3).to(dtype).view(shape)
        part = local_slice_for(x, source, rank).requires_grad_(dtype.is_floating_point)
        torch.library.opcheck(_sp.repartition.default, (part, source.spec, target.spec, group))
        moved = _sp.repartition(part, source.spec, target.spec, group)
        assert torch.equal(moved.detach(), local_slice_for(x, target, rank))


@pytest.mark.parametrize(("source", "target"), [(FOLDED, BLOCKS), (UNEVEN, ODD)], ids=str)
def test_the_op_is_one_to_compilers_too(source: Shard, target: Shard) -> None:
    get_pool(2).run(opcheck_on_rank, source, target, timeout=60)


@pytest.mark.parametrize(
    "target",
    [
        Shard(0, Partition.contiguous(8, 2)),
        Shard(1, Partition.contiguous(4, 2), outer=3),
        Shard(1, Partition.contiguous(6, 2)),
    ],
    ids=lambda shard: shard.spec,
)
def test_what_is_no_repartition_is_refused(target: Shard) -> None:
    x = randn(2, 4)
    for ends in ((BLOCKS.spec, target.spec), (target.spec, BLOCKS.spec)):
        with pretend(PRETENDED_GROUP, 0), pytest.raises(ValueError, match="keeps the axis and one owner of each index"):
            _sp.repartition(x, *ends, PRETENDED_GROUP)


def test_indices_are_not_shared_at_both_ends() -> None:
    shared = Shard(1, Partition.of(8, [[(0, 8)], [(4, 8)]])).spec
    with pretend(PRETENDED_GROUP, 0), pytest.raises(ValueError, match="one owner of each index at one end"):
        _sp.repartition(randn(2, 8), shared, shared, PRETENDED_GROUP)


def test_the_transpose_sums_what_neighbours_read() -> None:
    halo = Shard(1, with_halo(BLOCKS.partition, 2))

    def on_rank(rank: int) -> tuple[Tensor, Tensor]:
        x = local_slice_for(torch.arange(8.0)[None], BLOCKS, rank).requires_grad_()
        read = _sp.repartition(x, BLOCKS.spec, halo.spec, PRETENDED_GROUP)
        (grad,) = torch.autograd.grad(read.sum(), x)
        return read.detach(), grad

    (first, of_first), (second, of_second) = in_lockstep(2, on_rank)
    assert first.tolist() == [[0, 1, 2, 3, 4, 5]] and second.tolist() == [[2, 3, 4, 5, 6, 7]]
    assert of_first.tolist() == [[1, 1, 2, 2]] and of_second.tolist() == [[2, 2, 1, 1]]
