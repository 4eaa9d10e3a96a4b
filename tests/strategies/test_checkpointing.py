"""What the backward recomputes: rings are not run again, gathered keys only where that is asked for.

Graphs are those AOTAutograd derives on each rank, run in lockstep.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.nn import functional
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from sptransform.engine.strategy import Strategy
from sptransform.strategies.ring import AllGatherKV, Ring
from sptransform.strategies.usp import USP
from tests.end_to_end.test_users_checkpointing import CONTEXTS
from tests.support.equality import assert_equal_to_one_device, run_one_device
from tests.support.models import FLOAT64, IGNORED, Inputs
from tests.support.rewritten import Asked, on_pretended_ranks
from tests.support.shapes import ShapedDecoder, build_shape

SIZE = 20


class Checkpointed(ShapedDecoder):
    """Every block recomputed in the backward."""

    options: ClassVar[dict[str, Any]] = {}

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.tokens(input_ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False, **self.options)
        return functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def checkpointed(which: str | None) -> tuple[nn.Module, Inputs]:
    """A layer with this context of `tests/end_to_end/test_users_checkpointing.py`; None: no checkpointing."""
    model, inputs = build_shape(6, 2, 2, SIZE, repeat=False, num_layers=1)
    if which is not None:
        model.__class__ = Checkpointed
        model.options = {} if CONTEXTS[which] is None else {"context_fn": CONTEXTS[which]}
    return model, inputs


@dataclass(frozen=True)
class Step:
    """The ops of each direction, and the shapes of what is saved from one for the other."""

    forward: Counter[str]
    backward: Counter[str]
    saved: list[tuple[int, ...]]


def step(which: str | None, strategy: Strategy, num_ranks: int) -> Step:
    """One step, in which every rank has one device's result."""
    graphs: dict[str, fx.GraphModule] = {}
    compiler = aot_autograd(
        fw_compiler=lambda gm, inputs: graphs.setdefault("forward", gm),
        bw_compiler=lambda gm, inputs: graphs.setdefault("backward", gm),
        partition_fn=min_cut_rematerialization_partition,
    )
    (ranks,) = on_pretended_ranks(*checkpointed(which), [Asked(num_ranks, strategy)], compiler).values()
    for result in ranks.results():
        assert_equal_to_one_device(run_one_device(*checkpointed(which)), result, FLOAT64)
    assert len({id(graph) for graph in ranks.graphs}) == 1
    directions = [graphs[name].graph.nodes for name in ("forward", "backward")]
    ops = [Counter(str(node.target) for node in nodes if node.op == "call_function") for nodes in directions]
    inputs = [node.meta["val"] for node in directions[1] if node.op == "placeholder"]
    return Step(*ops, [tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)])


GATHER = "_c10d_functional.all_gather_into_tensor.default"
RINGS = ("sptransform.ring_attention.default", "sptransform.ring_attention_backward.default")


@pytest.mark.parametrize(
    ("which", "strategy", "num_ranks"),
    [(None, Ring(), 2), ("all", Ring(), 2), ("second", Ring(), 2), ("all", USP(2, 2), 4)],
    ids=str,
)
def test_a_ring_is_not_run_again(which: str | None, strategy: Strategy, num_ranks: int) -> None:
    found = step(which, strategy, num_ranks)
    assert [found.forward[name] for name in RINGS] == [1, 0]
    assert [found.backward[name] for name in RINGS] == [0, 1]


@pytest.mark.parametrize(
    ("which", "regather"),
    [(None, False), (None, True), ("all", False), ("all", True), ("attention", True)],
)
def test_keys_are_gathered_again_where_that_is_asked_for(which: str | None, regather: bool) -> None:
    found = step(which, AllGatherKV(regather=regather), 2)
    assert (found.forward[GATHER], found.backward[GATHER]) == (1, regather)
    of_keys = [shape for shape in found.saved if SIZE in shape and len(shape) == 4]
    assert bool(of_keys) != regather, found.saved


class Dropping(nn.Module):
    """Attention with dropout, recomputed in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 24).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.attend, x, use_reentrant=False).sum()

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.projection(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return functional.scaled_dot_product_attention(query, key, value, dropout_p=0.3, is_causal=True)


@pytest.mark.parametrize("strategy", [Ring(), AllGatherKV(), USP(2, 2), USP(4, 1)], ids=str)
def test_dropout_is_not_drawn_again(strategy: Strategy) -> None:
    """The op draws inside; run again it would drop other probabilities than the loss has seen."""
    inputs = {"x": torch.ones(1, 16, 8, dtype=torch.float64)}
    (ranks,) = on_pretended_ranks(Dropping(), inputs, [Asked(4, strategy)]).values()
    (node,) = [n for n in ranks.graphs[0].graph_module.graph.nodes if str(n.target) == RINGS[0]]
    assert node.meta["recompute"] is CheckpointPolicy.MUST_SAVE
