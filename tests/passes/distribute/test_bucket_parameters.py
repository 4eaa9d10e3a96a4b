"""Parameters kept in parts are gathered in buckets, each one bucket ahead of use."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from sptransform.graph import dataflow, notes
from sptransform.graph.redistribute import is_redistribute
from sptransform.passes import PIPELINE
from sptransform.passes.distribute.bucket_parameters import BucketParameters
from sptransform.passes.distribute.fuse_redistributes import FuseRedistributes
from sptransform.sharding.placement import R
from tests.passes.blocks import Attention, hidden_states
from tests.support.graphs import a_context, after

BEFORE = tuple(PIPELINE)[: [type(step) for step in PIPELINE].index(FuseRedistributes) + 1]


def test_what_is_gathered_stands_one_bucket_earlier() -> None:
    context = replace(a_context(), shard_parameters=True)
    gm, _ = after((*BEFORE, BucketParameters(bucket_bytes=800)), Attention(), hidden_states(), context=context)
    nodes = list(gm.graph.nodes)
    gathers = [node for node in nodes if is_redistribute(node) and set(notes.note(node).placements) == {R}]
    gathers = [node for node in gathers if all(x.op == "placeholder" for x in dataflow.operands(node))]
    assert [[x.name for x in dataflow.operands(node)] for node in gathers] == [
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
