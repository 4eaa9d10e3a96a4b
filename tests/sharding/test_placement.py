"""Placements: their text, their local shapes, and the table of transitions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sptransform.sharding.partition import Partition
from sptransform.sharding.placement import TRANSITIONS, I, P, Placement, R, Shard, kind, local_shape, repartitions
from tests.sharding.test_partition import partitions


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
        (Shard(0, Partition.zigzag(64, 4), outer=2), "S(0:2*64/4z)"),
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


@pytest.mark.parametrize("outer", [1, 3])
@pytest.mark.parametrize("form", [Partition.blocks, Partition.zigzag])
def test_an_open_size_is_that_of_the_tensor(form: Callable[[int, int], Partition], outer: int) -> None:
    k = sympy.Symbol("k", integer=True, positive=True)
    spec = Shard(1, form(8 * k, 4), outer).spec
    assert spec == f"S(1:{'3*' if outer == 3 else ''}?/4{'z' if form is Partition.zigzag else ''})"
    for length in (8, 24):
        shard = Shard(1, form(length, 4), outer)
        assert Shard.parse(spec, full=torch.empty(2, outer * length)) == shard
        assert Shard.parse(spec, part=torch.empty(2, outer * length // 4)) == shard
    with pytest.raises(ValueError, match="not a shard"):
        Shard.parse(spec)


def test_what_only_gives_indices_other_owners() -> None:
    blocks, zigzag = (Shard(1, form(8, 2)) for form in (Partition.contiguous, Partition.zigzag))
    assert repartitions(blocks, zigzag) and repartitions(zigzag, blocks)
    shared = Shard(1, Partition.of(8, [[(0, 8)], [(4, 8)]]))
    others = (I, Shard(2, zigzag.partition), replace(zigzag, outer=2), Shard(1, Partition.contiguous(6, 2)))
    for other in others:
        assert not repartitions(blocks, other) and not repartitions(other, blocks)
    assert repartitions(blocks, shared) and not repartitions(shared, blocks)


@pytest.mark.parametrize(
    ("shard", "contiguous"),
    [
        (Shard(0, Partition.contiguous(64, 4)), True),
        (Shard(0, Partition.contiguous(5, 4)), True),
        (Shard(0, Partition.contiguous(64, 4), outer=2), False),
        (Shard(0, Partition.balanced(6, 4)), False),
        (Shard(0, Partition.zigzag(64, 4)), False),
    ],
    ids=lambda x: x.spec if isinstance(x, Shard) else str(x),
)
def test_what_dtensor_can_express(shard: Shard, contiguous: bool) -> None:
    assert shard.is_contiguous == contiguous


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
