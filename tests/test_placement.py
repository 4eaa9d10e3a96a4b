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


def test_transitions_are_complete_and_transposed() -> None:
    """The backward of a transition is the forward of the transposed one: I and P change places, R and S stay."""
    transposed = {"I": "P", "P": "I", "R": "R", "S": "S"}
    # R's gradient is a pending sum and I's a replicated one, so as gradients: I -> I, P -> I, R -> P, S -> S
    gradient = {"I": "I", "P": "I", "R": "P", "S": "S"}
    kinds = set(transposed)
    assert set(TRANSITIONS) == {(a, b) for a in kinds for b in kinds if a != b or a == "S"}
    for (source, target), (_, backward) in TRANSITIONS.items():
        moved = (gradient[target], gradient[source])
        if moved[0] == moved[1] and moved[0] != "S":
            assert backward is None or (source, target) == ("R", "R"), (source, target)
        elif moved == ("S", "S"):
            assert backward == "all_to_all"
        else:
            expected = {
                ("P", "I"): "all_reduce",
                ("P", "S"): "reduce_scatter",
                ("S", "I"): "all_gather",
                ("S", "P"): None,
                ("I", "S"): None,
                ("I", "P"): None,
            }
            assert backward == expected[moved], (source, target)
