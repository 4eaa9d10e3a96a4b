"""Moves for one op travel together; of different dtypes, or for different ops, they do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn import functional

from sptransform import AllGatherKV
from sptransform.graph import dataflow, notes
from sptransform.graph.printer import text
from sptransform.graph.redistribute import insert_redistribute, is_redistribute
from sptransform.passes.distribute.fuse_redistributes import FuseRedistributes
from sptransform.passes.distribute.insert_redistributes import InsertRedistributes
from sptransform.sharding.partition import Partition
from sptransform.sharding.placement import I, R, Shard, kind
from tests.passes.blocks import heads
from tests.support.golden import Golden
from tests.support.graphs import a_context, after, assert_ranks_equal_one_device, nodes_of, on_ranks

WEIGHT = torch.eye(2, dtype=torch.float64)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    query, key, value = (functional.linear(x, WEIGHT) for x in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value)


def exchanges(gm: fx.GraphModule) -> list[int]:
    """Tensors in each all-to-all, in order."""
    found = []
    for node in gm.graph.nodes:
        if is_redistribute(node):
            kinds = [(kind(a), kind(b)) for a, b in notes.note(node).transitions]
            if kinds[0] == ("S", "S"):
                found.append(len(kinds))
    return found


def test_golden(golden: Golden) -> None:
    inputs = [heads() for _ in range(3)]
    before, _ = after(InsertRedistributes, attend, *inputs)
    gm, _ = after(FuseRedistributes, attend, *inputs)
    golden.check("fuse_redistributes", before=text(before.graph.nodes), after=text(gm.graph.nodes))


def test_query_key_and_value_travel_together() -> None:
    inputs = [heads() for _ in range(3)]
    assert exchanges(after(InsertRedistributes, attend, *inputs)[0]) == [1, 1, 1]
    assert exchanges(after(FuseRedistributes, attend, *inputs)[0]) == [3]


def test_another_dtype_travels_alone() -> None:
    """A sharded boolean mask over heads and queries moves beside float64 queries."""

    def model(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        scores = functional.linear(query, WEIGHT.new_ones(8, 2))
        query, key, value = (functional.linear(x, WEIGHT) for x in (query, key, value))
        return functional.scaled_dot_product_attention(query, key, value, scores > -1.0)

    inputs = [heads() for _ in range(3)]
    assert sorted(exchanges(after(FuseRedistributes, model, *inputs)[0])) == [1, 3]
    for num_ranks in (2, 4):
        reference, ranks, _ = on_ranks(model, *inputs, num_ranks=num_ranks)
        assert_ranks_equal_one_device(reference, ranks)


def test_different_ops_are_not_packed() -> None:
    def model(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attend(attend(query, key, value), key, value)

    inputs = [heads() for _ in range(3)]
    # the output of the first, then the query of the second; its keys and values are there already
    counts = exchanges(after(FuseRedistributes, model, *inputs)[0])
    assert counts[0] == 3 and len(counts) >= 2
    reference, ranks, _ = on_ranks(model, *inputs, num_ranks=2)
    assert_ranks_equal_one_device(reference, ranks)


def gathers(gm: fx.GraphModule) -> list[int]:
    """Tensors in each all-gather, in order."""
    found = []
    for node in gm.graph.nodes:
        if is_redistribute(node):
            transitions = notes.note(node).transitions
            if all(kind(a) + kind(b) == "SR" for a, b in transitions):
                found.append(len(transitions))
    return found


def test_gathered_keys_and_values_travel_together() -> None:
    inputs = [heads() for _ in range(3)]
    for passes, expected in ((InsertRedistributes, [1, 1]), (FuseRedistributes, [2])):
        gm, _ = after(passes, attend, *inputs, context=a_context(strategy=AllGatherKV()))
        assert gathers(gm) == expected
    reference, ranks, graphs = on_ranks(attend, *inputs, num_ranks=2, strategy=AllGatherKV())
    assert_ranks_equal_one_device(reference, ranks)
    assert [len(nodes_of(gm, torch.ops.sptransform.all_gather_packed.default)) for gm in graphs] == [1, 1]


def test_gathers_for_different_ops_are_not_packed() -> None:
    def model(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attend(attend(query, key, value), key.sin(), value.sin())

    inputs = [heads() for _ in range(3)]
    gm, _ = after(FuseRedistributes, model, *inputs, context=a_context(strategy=AllGatherKV()))
    assert gathers(gm) == [2, 2]


def moved(targets: list[Any], dtypes: list[torch.dtype]) -> list[tuple[int, Any]]:
    """(tensors, first target) of each move that is left of moves of rows of 8 x 8, all for one op."""
    graph = fx.Graph()
    rows = Shard(0, Partition.contiguous(8, 2))
    inputs = [graph.placeholder(f"x{i}") for i in range(len(targets))]
    for x, dtype in zip(inputs, dtypes, strict=True):
        x.meta["val"] = torch.empty(8, 8, dtype=dtype)
        notes.set_placement(x, rows)
    output = graph.output(tuple(inputs))
    moves = [insert_redistribute(output, [x], [(rows, t)])[0] for x, t in zip(inputs, targets, strict=True)]
    output.args = (tuple(moves),)
    FuseRedistributes().run(graph, a_context())
    assert [notes.placement(node) for node in dataflow.operands(output)] == targets
    changes = [notes.note(node).transitions for node in graph.nodes if is_redistribute(node)]
    return [(len(transitions), transitions[0][1]) for transitions in changes]


def test_gathers_of_different_dtypes_are_not_packed() -> None:
    f32, f64 = torch.float32, torch.float64
    assert moved([R] * 4, [f32, f64, f32, f64]) == [(2, R), (2, R)]
    assert moved([R] * 2, [f32, f64]) == [(1, R), (1, R)]


def test_gathers_do_not_travel_with_exchanges_or_with_what_becomes_invariant() -> None:
    columns = Shard(1, Partition.contiguous(8, 2))
    found = moved([R, columns, I, R, columns, I], [torch.float32] * 6)
    assert sorted(found, key=str) == sorted([(2, R), (2, columns), (1, I), (1, I)], key=str)


def test_moves_along_one_axis_are_not_packed() -> None:
    columns = Shard(1, Partition.contiguous(8, 2))
    along = [Shard(0, Partition.zigzag(8, 2)), Shard(0, Partition.of(8, [[(0, 3)], [(3, 8)]]))]
    found = moved([columns, along[0], columns, along[1]], [torch.float32] * 4)
    assert sorted(found, key=str) == sorted([(2, columns), (1, along[0]), (1, along[1])], key=str)


def test_what_a_later_move_reads_stays_in_front_of_it() -> None:
    """Where ranks share indices, only the first owners' are moved on, by a redistribute of its own in between."""
    graph = fx.Graph()
    rows, columns = Shard(0, Partition.contiguous(8, 2)), Shard(1, Partition.contiguous(8, 2))
    shared = Shard(0, Partition.of(8, [[(0, 5)], [(3, 8)]]))
    owned = Shard(0, shared.partition.first_owners())
    inputs = [graph.placeholder(name) for name in ("x", "y")]
    for x, placement in zip(inputs, (rows, shared), strict=True):
        x.meta["val"] = torch.empty(8, 8)
        notes.set_placement(x, placement)
    output = graph.output(tuple(inputs))
    (first,) = insert_redistribute(output, inputs[:1], [(rows, columns)])
    (own,) = insert_redistribute(output, inputs[1:], [(shared, owned)])
    (second,) = insert_redistribute(output, [own], [(owned, columns)])
    output.args = ((first, second),)
    FuseRedistributes().run(graph, a_context())
    graph.lint()
    moved_together = [node for node in graph.nodes if is_redistribute(node) and len(node.args[0]) == 2]
    assert [dataflow.operands(node) for node in moved_together] == [[inputs[0], own]]
