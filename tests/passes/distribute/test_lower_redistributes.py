"""Each change of placement becomes the op that does it; in a checkpointed region its result is saved."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from sptransform.graph.printer import text
from sptransform.graph.redistribute import is_redistribute
from sptransform.passes.distribute.lower_redistributes import LowerRedistributes
from tests.passes.blocks import Attention, by_repeat_interleave, hidden_states
from tests.support.golden import Golden
from tests.support.graphs import after, nodes_of


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


class Neighbours(Attention):
    """Every token with the one before it: two clips of the sequence, which the ranks own differently."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        return x[:, 1:] * x[:, :-1]


def test_a_move_along_one_axis_is_one_op() -> None:
    gm, _ = after(LowerRedistributes, Neighbours(), hidden_states())
    (node,) = nodes_of(gm, torch.ops.sptransform.repartition.default)
    assert {*node.args[1:3]} == {"S(1:7[0:3|3:7])", "S(1:7[0:4|4:7])"}


def test_a_move_along_one_axis_in_a_checkpointed_region_is_saved() -> None:
    model = Neighbours()
    gm, _ = after(LowerRedistributes, lambda x: checkpoint(model, x, use_reentrant=False), hidden_states())
    (node,) = nodes_of(gm, torch.ops.sptransform.repartition.default)
    assert node.meta["recompute"] == CheckpointPolicy.MUST_SAVE
