"""Moves for one op travel together; of different dtypes, or for different ops, they do not."""

from __future__ import annotations

import torch
from torch import fx
from torch.nn import functional

from sptransform import annotations
from sptransform.partition import Partition
from sptransform.passes.insert_redistributes import InsertRedistributes
from sptransform.passes.pack_moves import PackMoves
from sptransform.placement import Shard, kind
from sptransform.printer import text
from sptransform.rewriter import insert_redistribute, is_redistribute
from tests.golden import Golden
from tests.graphs import a_context, after, assert_ranks_equal_one_device, on_ranks
from tests.passes.blocks import heads

WEIGHT = torch.eye(2, dtype=torch.float64)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    query, key, value = (functional.linear(x, WEIGHT) for x in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value)


def exchanges(gm: fx.GraphModule) -> list[int]:
    """Tensors in each all-to-all, in order."""
    found = []
    for node in gm.graph.nodes:
        if is_redistribute(node):
            kinds = [(kind(a), kind(b)) for a, b in annotations.note(node).transitions]
            if kinds[0] == ("S", "S"):
                found.append(len(kinds))
    return found


def test_golden(golden: Golden) -> None:
    inputs = [heads() for _ in range(3)]
    before, _ = after(InsertRedistributes, attend, *inputs)
    gm, _ = after(PackMoves, attend, *inputs)
    golden.check("pack_moves", before=text(before.graph.nodes), after=text(gm.graph.nodes))


def test_query_key_and_value_travel_together() -> None:
    inputs = [heads() for _ in range(3)]
    assert exchanges(after(InsertRedistributes, attend, *inputs)[0]) == [1, 1, 1]
    assert exchanges(after(PackMoves, attend, *inputs)[0]) == [3]


def test_another_dtype_travels_alone() -> None:
    """A sharded boolean mask over heads and queries moves beside float64 queries."""

    def model(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        scores = functional.linear(query, WEIGHT.new_ones(8, 2))
        query, key, value = (functional.linear(x, WEIGHT) for x in (query, key, value))
        return functional.scaled_dot_product_attention(query, key, value, scores > -1.0)

    inputs = [heads() for _ in range(3)]
    assert sorted(exchanges(after(PackMoves, model, *inputs)[0])) == [1, 3]
    for num_ranks in (2, 4):
        reference, ranks, _ = on_ranks(model, *inputs, num_ranks=num_ranks)
        assert_ranks_equal_one_device(reference, ranks)


def test_different_ops_are_not_packed() -> None:
    def model(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attend(attend(query, key, value), key, value)

    inputs = [heads() for _ in range(3)]
    # the output of the first, then the query of the second; its keys and values are there already
    counts = exchanges(after(PackMoves, model, *inputs)[0])
    assert counts[0] == 3 and len(counts) >= 2
    reference, ranks, _ = on_ranks(model, *inputs, num_ranks=2)
    assert_ranks_equal_one_device(reference, ranks)


def test_moves_along_one_axis_are_not_packed() -> None:
    graph = fx.Graph()
    rows, columns = Shard(0, Partition.contiguous(8, 2)), Shard(1, Partition.contiguous(8, 2))
    targets = [columns, Shard(0, Partition.zigzag(8, 2)), columns, Shard(0, Partition.of(8, [[(0, 3)], [(3, 8)]]))]
    inputs = [graph.placeholder(f"x{i}") for i in range(len(targets))]
    for x in inputs:
        x.meta["val"] = torch.empty(8, 8)
        annotations.set_placement(x, rows)
    output = graph.output(tuple(inputs))
    moved = [insert_redistribute(output, [x], [(rows, t)])[0] for x, t in zip(inputs, targets, strict=True)]
    output.args = (tuple(moved),)
    PackMoves().run(graph, a_context())
    found = [annotations.note(node).transitions for node in graph.nodes if is_redistribute(node)]
    assert sorted(map(len, found)) == [1, 1, 2]
    assert {transitions[0][1] for transitions in found if len(transitions) == 1} == {targets[1], targets[3]}
    assert [annotations.placement(node) for node in annotations.operands(output)] == targets
