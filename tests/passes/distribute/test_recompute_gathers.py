"""Gathered keys are gathered again in the backward where the strategy says so, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from sptransform import AllGatherKV, Ring, Strategy, Ulysses
from sptransform.graph.printer import text
from sptransform.passes.distribute.recompute_gathers import RecomputeGathers
from tests.passes.blocks import Attention, by_repeat_interleave, hidden_states
from tests.support.golden import Golden
from tests.support.graphs import a_context, after, nodes_of


def gathering(strategy: Strategy, model: Callable[..., Any] | None = None) -> fx.GraphModule:
    context = a_context(strategy=strategy)
    return after(RecomputeGathers, model or Attention(by_repeat_interleave), hidden_states(), context=context)[0]


def recomputed(gm: fx.GraphModule) -> list[str]:
    return [n.name for n in gm.graph.nodes if n.meta.get("recompute") == CheckpointPolicy.MUST_RECOMPUTE]


def test_golden(golden: Golden) -> None:
    gm = gathering(AllGatherKV(regather=True))
    golden.check("recompute_gathers", after=text(gm.graph.nodes), recomputed="\n".join(recomputed(gm)))


def test_keys_and_values_are_recomputed_with_the_message_they_came_in() -> None:
    gm = gathering(AllGatherKV(regather=True))
    (gather,) = nodes_of(gm, torch.ops.sptransform.all_gather_packed.default)
    assert recomputed(gm) == [gather.name, *(user.name for user in gather.users)]
    assert len(gather.users) == 2
    # torch's partitioner reads the region's number wherever it finds the tag
    assert all("ac_graph_id" in n.meta for n in gm.graph.nodes if n.name in recomputed(gm))


@pytest.mark.parametrize("strategy", [AllGatherKV(), Ring(), Ring(kv="allgather"), Ulysses()], ids=str)
def test_without_the_option_nothing_is(strategy: Strategy) -> None:
    assert recomputed(gathering(strategy)) == []


@pytest.mark.parametrize("regather", [False, True])
def test_in_a_checkpointed_region_the_strategy_has_the_last_word(regather: bool) -> None:
    """What is sent in a region is saved, unless it is to be gathered again."""
    model = Attention(by_repeat_interleave)
    gm = gathering(AllGatherKV(regather=regather), lambda x: checkpoint(model, x, use_reentrant=False))
    (gather,) = nodes_of(gm, torch.ops.sptransform.all_gather_packed.default)
    assert gather.meta["recompute"] == (CheckpointPolicy.MUST_RECOMPUTE if regather else CheckpointPolicy.MUST_SAVE)


def test_other_gathers_are_saved() -> None:
    """A sort along the sequence needs all of it, and attention does not read it."""
    model = Attention(by_repeat_interleave)
    gm = gathering(AllGatherKV(regather=True), lambda x: model(x).sort(1).values)
    gathers = nodes_of(gm, torch.ops.sptransform.all_gather.default)
    assert gathers and not {node.name for node in gathers} & set(recomputed(gm))
