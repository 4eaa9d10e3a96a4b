"""Parameters kept in parts are gathered in buckets, each one bucket ahead of use."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from sptransform import annotations
from sptransform.passes import PIPELINE
from sptransform.passes.gather_parameters import GatherParameters
from sptransform.passes.pack_moves import PackMoves
from sptransform.placement import R
from sptransform.rewriter import is_redistribute
from tests.graphs import a_context, after
from tests.passes.blocks import Attention, hidden_states

BEFORE = PIPELINE[: [type(step) for step in PIPELINE].index(PackMoves) + 1]


def test_what_is_gathered_stands_one_bucket_earlier() -> None:
    context = replace(a_context(), shard_parameters=True)
    gm, _ = after((*BEFORE, GatherParameters(bucket_bytes=800)), Attention(), hidden_states(), context=context)
    nodes = list(gm.graph.nodes)
    gathers = [node for node in nodes if is_redistribute(node) and set(annotations.note(node).placements) == {R}]
    gathers = [node for node in gathers if all(x.op == "placeholder" for x in annotations.operands(node))]
    assert [[x.name for x in annotations.operands(node)] for node in gathers] == [
        ["query_weight", "key_weight"],
        ["value_weight", "out_weight"],
        ["out_bias"],
    ]

    def first_read(gather: fx.Node) -> int:
        return min(nodes.index(reader) for picked in gather.users for reader in picked.users)

    first, second, third = gathers
    assert nodes.index(first) < nodes.index(second) < first_read(first)
    assert nodes.index(third) < first_read(second)
    assert first_read(first) < nodes.index(third)
