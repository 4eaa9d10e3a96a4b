"""Each change of placement becomes the op that does it; in a checkpointed region its result is saved."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from sptransform.passes.lower_redistributes import LowerRedistributes
from sptransform.printer import text
from sptransform.rewriter import is_redistribute
from tests.golden import Golden
from tests.graphs import after
from tests.passes.blocks import Attention, by_repeat_interleave, hidden_states


def test_golden(golden: Golden) -> None:
    gm, _ = after(LowerRedistributes, Attention(by_repeat_interleave), hidden_states())
    golden.check("lower_redistributes", after=text(gm.graph.nodes))
    assert not any(is_redistribute(node) for node in gm.graph.nodes)


def test_results_in_a_checkpointed_region_are_saved() -> None:
    model = Attention()
    gm, _ = after(
        LowerRedistributes, lambda x: checkpoint(model, x, use_reentrant=False), hidden_states()
    )
    policies = [
        node.meta["recompute"]
        for node in gm.graph.nodes
        if node.target == torch.ops.sptransform.all_to_all.default
    ]
    assert policies == [CheckpointPolicy.MUST_SAVE] * 2
    others = {node.meta["recompute"] for node in gm.graph.nodes if node.target == torch.ops.aten.linear.default}
    assert others == {CheckpointPolicy.PREFER_RECOMPUTE}


def test_outside_of_regions_nothing_is_tagged() -> None:
    gm, _ = after(LowerRedistributes, Attention(), hidden_states())
    assert not any("recompute" in node.meta for node in gm.graph.nodes)
