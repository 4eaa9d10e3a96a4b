"""A ring's node becomes its hops and blocks: a hop is on its way while the block before it is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch.nn import functional

from sptransform import AllGatherKV, Ring, Strategy
from sptransform.engine.pass_manager import DISTRIBUTED, run_passes
from sptransform.graph.printer import text
from sptransform.passes import PIPELINE
from sptransform.passes.inspect.expand_rings import ExpandRings
from tests.passes.blocks import heads
from tests.support.golden import Golden
from tests.support.graphs import a_context, after, nodes_of

WEIGHT = torch.eye(2, dtype=torch.float64)
START, WAIT = torch.ops._c10d_functional.all_to_all_single.default, torch.ops._c10d_functional.wait_tensor.default
RING, BLOCK = torch.ops.sptransform.ring_attention.default, torch.ops.sptransform.attention_block.default
KINDS = {START: "start", WAIT: "wait", BLOCK: "block"}


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    query, key, value = (functional.linear(x, WEIGHT) for x in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def expanded(
    num_ranks: int, rank: int = 0, *, strategy: Strategy | None = None, model: Callable[..., Any] = attend
) -> fx.GraphModule:
    inputs = [heads(12) for _ in range(3)]
    context = a_context(num_ranks, rank, strategy=strategy or Ring())
    gm, _ = after(PIPELINE, model, *inputs, context=context)
    return run_passes(gm, [ExpandRings()], context, DISTRIBUTED)


def schedule(gm: fx.GraphModule) -> list[str]:
    return [KINDS[node.target] for node in gm.graph.nodes if node.target in KINDS]


def test_golden(golden: Golden) -> None:
    golden.check("expand_rings", after=text(expanded(3, 1).graph.nodes, is_local=True))


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_hops_are_started_before_a_block_and_waited_for_after_it(num_ranks: int) -> None:
    """Under causal zigzag every rank computes one block a step, whichever it is."""
    for rank in range(num_ranks):
        gm = expanded(num_ranks, rank)
        assert schedule(gm) == ["start", "block", "wait"] * (num_ranks - 1) + ["block"]
        for start, wait in zip(nodes_of(gm, START), nodes_of(gm, WAIT), strict=True):
            assert wait.args == (start,)
            received, sent = start.args[1:3]
            assert [i for i, size in enumerate(sent) if size] == [(rank + 1) % num_ranks]
            assert [i for i, size in enumerate(received) if size] == [(rank - 1) % num_ranks]


def test_ranks_pass_on_what_they_received() -> None:
    gm = expanded(3)
    first, second = nodes_of(gm, START)
    assert second.args[0] is nodes_of(gm, WAIT)[0]
    assert first.args[0].target is torch.ops.sptransform.pack_block.default


def test_no_ring_is_left() -> None:
    gm = expanded(2, model=lambda q, k, v: attend(attend(q, k, v), k, v))
    assert not nodes_of(gm, RING)
    assert schedule(gm) == ["start", "block", "wait", "block"] * 2


def test_results_keep_their_names_and_types() -> None:
    """Whoever read the ring's output reads the same of the steps."""
    context = a_context(3, 1, strategy=Ring())
    gm, _ = after(PIPELINE, attend, *(heads(12) for _ in range(3)), context=context)
    (before,) = [node for node in gm.graph.nodes if node.op == "output"]
    shapes = [node.meta["val"].shape for node in before.all_input_nodes]
    run_passes(gm, [ExpandRings()], context, DISTRIBUTED)
    (output,) = [node for node in gm.graph.nodes if node.op == "output"]
    assert [node.meta["val"].shape for node in output.all_input_nodes] == shapes


def test_gathered_keys_have_no_hops() -> None:
    gm = expanded(3, strategy=AllGatherKV())
    assert "start" not in schedule(gm)
