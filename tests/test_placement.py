"""Placements: their text, their local shapes, and the table of transitions."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sptransform.partition import Partition
from sptransform.placement import TRANSITIONS, I, P, Placement, R, Shard, kind, local_shape
from tests.test_partition import partitions


@pytest.mark.parametrize(
    ("placement", "text"), [(R, "R"), (I, "I"), (P, "P"), (Shard(1, Partition.contiguous(8, 2)), "S(1)")], ids=str
)
def test_printed_form(placement: Placement, text: str) -> None:
    assert str(placement) == text
    assert kind(placement) == text[0]


@pytest.mark.parametrize(
    ("shard", "spec"),
    [
        (Shard(0, Partition.contiguous(64, 4)), "S(0:64/4)"),
        (Shard(0, Partition.contiguous(64, 4), outer=2), "S(0:2*64/4)"),
        (Shard(2, Partition.contiguous(5, 2), outer=3), "S(2:3*5[0:3|3:5])"),
    ],
    ids=str,
)
def test_spec(shard: Shard, spec: str) -> None:
    assert shard.spec == spec


@given(partitions(), st.integers(0, 5), st.integers(1, 4))
@settings(deadline=None, derandomize=True)
def test_parse_inverts_spec(partition: Partition, dim: int, outer: int) -> None:
    shard = Shard(dim, partition, outer)
    assert Shard.parse(shard.spec) == shard


@pytest.mark.parametrize("text", ["R", "S(0)", "S(0:)", "S(0:2*)", "S(0:2*2*8/2)", "S(x:8/2)", "S(0:8/2) "])
def test_parse_refuses_other_text(text: str) -> None:
    with pytest.raises(ValueError):
        Shard.parse(text)


def test_local_shape() -> None:
    shard = Shard(1, Partition.contiguous(5, 2), outer=2)
    assert shard.dim_size == 10
    assert [local_shape(shard, (3, 10, 4), rank) for rank in range(2)] == [(3, 6, 4), (3, 4, 4)]
    assert local_shape(P, (3, 10), 1) == local_shape(R, (3, 10), 0) == local_shape(I, (3, 10), 0) == (3, 10)
    with pytest.raises(ValueError, match=r"dimension 1 of \(3, 9\) is not the 10 of S\(1:2\*5"):
        local_shape(shard, (3, 9), 0)


def test_transitions_are_transposed() -> None:
    """The backward collective is the one that the gradients' own change of placement needs."""
    # how the gradient of each placement is placed: of R it is a pending sum, of I and P every rank has it
    of_gradient = {"I": "I", "P": "I", "R": "P", "S": "S"}
    needed = {
        ("I", "I"): None,
        ("I", "P"): None,
        ("I", "S"): None,
        ("P", "I"): "all_reduce",
        ("P", "S"): "reduce_scatter",
        ("S", "I"): "all_gather",
        ("S", "P"): None,
        ("S", "S"): "all_to_all",
    }
    for (source, target), (_, backward) in TRANSITIONS.items():
        assert backward == needed[of_gradient[target], of_gradient[source]], (source, target)


def test_every_placement_can_be_reached_from_every_other() -> None:
    pairs = {(a, b) for a in "IPRS" for b in "IPRS" if a != b or a == "S"}
    # nothing has a use for a shard or a replicated value as a pending sum
    assert set(TRANSITIONS) == pairs - {("S", "P"), ("R", "P")}
