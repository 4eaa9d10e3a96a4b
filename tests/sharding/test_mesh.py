"""Ranks as one mesh dim and as two: who is where, and which process groups there are."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from sptransform import USP, Ring, UsageError
from sptransform.sharding.mesh import MOST_PRETENDED, PRETENDED_GROUP, Mesh
from tests.support.gloo_pool import get_pool


@pytest.mark.parametrize(("outer", "inner"), [(2, 3), (3, 2), (1, 6), (6, 1)])
def test_pretended_ranks(outer: int, inner: int) -> None:
    """The ranks of the second dim are neighbours; nobody is in two places."""
    places = []
    for rank in range(6):
        mesh = Mesh.pretended(6, rank)
        first, second = mesh.split(outer, inner)
        assert (first.size, second.size) == (outer, inner)
        assert first.rank * inner + second.rank == rank
        assert len({mesh.group, first.group, second.group}) == 3
        assert first.device_mesh is second.device_mesh is None
        places.append((first.rank, second.rank))
    assert len(set(places)) == 6


def test_pretended_ranks_have_one_group() -> None:
    assert Mesh.pretended(3, 2) == Mesh(3, 2, PRETENDED_GROUP)


@pytest.mark.parametrize(("world_size", "rank"), [(0, 0), (2, 2), (2, -1)])
def test_ranks_that_are_not_there(world_size: int, rank: int) -> None:
    with pytest.raises(UsageError, match="no such rank"):
        Mesh.pretended(world_size, rank)


def test_more_ranks_than_a_table_of_them_has_room_for() -> None:
    assert Mesh.pretended((64, 64), 4095).size == MOST_PRETENDED
    for world_size in (4097, 100_000, (4096, 2)):
        with pytest.raises(UsageError, match="too many ranks to pretend"):
            Mesh.pretended(world_size)


def ranks_of(mesh: Mesh) -> tuple[int, int, list[int]]:
    """Size, rank, and the members of the group that a graph would name."""
    group = dist.distributed_c10d._resolve_process_group(mesh.group)
    assert (group.size(), group.rank()) == (mesh.size, mesh.rank)
    assert mesh.device_mesh.get_group().group_name == mesh.group
    return mesh.size, mesh.rank, dist.get_process_group_ranks(group)


def split_really(rank: int, world_size: int) -> dict[str, Any]:
    """What a worker does: every way to come to two dims."""
    found: dict[str, Any] = {}
    with mock.patch.object(dist, "new_group", wraps=dist.new_group) as made:
        one = USP().mesh_of(None)
        found["whole"] = one.size, one.rank, dist.get_process_group_ranks(dist.group.WORLD)
        found["groups"] = made.call_count
        found["split"] = [ranks_of(part) for part in one.split(2, 2)]
        # nothing is made twice, whoever asks
        again = USP(2, 2).mesh_of(None)
        assert [part.group for part in again.split(2, 2)] == [part.group for part in one.split(2, 2)]
        assert Ring().mesh_of(None).group == one.group
        found["groups at the end"] = made.call_count
    given = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
    two = USP().mesh_of(given)
    assert (two.size, two.rank) == (4, rank)
    assert dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(two.group)) == [0, 1, 2, 3]
    found["given"] = [ranks_of(part) for part in two.split(2, 2)]
    assert [part.group for part in two.split(2, 2)] == [given.get_group(dim).group_name for dim in range(2)]
    # half of the ranks: the others need not know
    half = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))["sp"]
    part = USP().mesh_of(half)
    found["half"] = ranks_of(part)
    for wrong in (USP(3), USP(2, 1)):
        with pytest.raises(UsageError, match="not ring x ulysses"):
            wrong.mesh_of(None)
    with pytest.raises(UsageError, match="not ring x ulysses"):
        USP(2, 2).mesh_of(init_device_mesh("cpu", (4, 1)))
    return found


def test_real_ranks() -> None:
    ranks = get_pool(4).run(split_really, timeout=60)
    for rank, found in enumerate(ranks):
        assert found["whole"] == (4, rank, [0, 1, 2, 3])
        ring, ulysses = (2, rank // 2, [rank % 2, rank % 2 + 2]), (2, rank % 2, [rank // 2 * 2, rank // 2 * 2 + 1])
        assert found["split"] == found["given"] == [ring, ulysses]
        assert found["half"] == ulysses
        # none, if another test has had its groups made in these processes
        assert found["groups"] == found["groups at the end"]
        assert found["groups"] in (0, 2)
