"""Sequences that nothing attends to: state spaces, convolutions along a sequence, and hybrids, on ranks in lockstep."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from torch import fx

from sptransform.compiler.options import Options
from sptransform.compiler.rewrite import rewrite_graph
from sptransform.engine.traffic import count_collectives
from sptransform.sharding.mesh import Mesh
from sptransform.strategies.names import StrategyLike
from sptransform.strategies.usp import USP
from tests.support.equality import Result, _grads, assert_equal_to_one_device
from tests.support.graphs import while_captured
from tests.support.rewritten import Asked, Ranks, on_pretended_ranks
from tests.support.state_space import model_and_input
from tests.support.tiers import tiered

pytestmark = pytest.mark.timeout(120)


def ranks_of(layers: str, length: int, asked: list[Asked]) -> tuple[Result, dict[Asked, Ranks]]:
    model, inputs = model_and_input(layers, length)
    loss = model(**inputs)
    loss.backward()
    one = Result(loss.detach(), _grads(model))
    model.zero_grad()
    return one, on_pretended_ranks(model, inputs, asked)


CASES = [
    (layers, length, asked)
    for layers in ("chunks chunks", "chunks attention", "tree tree")
    for length in (24, 32, 23, 9)
    for asked in ((("ulysses", 2), ("ulysses", 3), ("megatron", 2)), (("ring", 3),), (("ring", 4), ("allgather", 3)))
]
# ranks that have equal shares, and do not the same at their borders
CASES += [("blur attention", 16, (("ring", 2), ("ulysses", 2))), ("shift attention", 16, (("ring", 2), ("ring", 4)))]
# over two mesh dims, the sums of the first say what is the sequence of the second
CASES += [("sums", 14, ((USP(2, 2), (2, 2)),))]


Pairs = tuple[tuple[StrategyLike, int | tuple[int, int]], ...]


@pytest.mark.parametrize(("layers", "length", "pairs"), tiered(CASES, quick=[("chunks attention", 23, (("ring", 3),))]))
def test_equal_to_one_device(layers: str, length: int, pairs: Pairs) -> None:
    """Whole chunks on every rank or not, a length that is none of chunks, more ranks than chunks."""
    asked = [Asked(num, strategy) for strategy, num in pairs]
    one, found = ranks_of(layers, length, asked)
    for ranks in found.values():
        for result in ranks.results():
            assert_equal_to_one_device(one, result, 1e-12)


SMALL = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
STATES = {"n_groups": 1, "d_state": 8, "chunk_size": 4, "expand": 2}
REAL = {
    "mamba2": lambda: transformers.Mamba2Config(
        **SMALL, state_size=8, expand=2, head_dim=8, num_heads=8, n_groups=2, chunk_size=4
    ),
    "bamba": lambda: transformers.BambaConfig(
        **SMALL,
        **HEADS,
        attn_layer_indices=[1],
        mamba_n_heads=8,
        mamba_d_head=8,
        **{f"mamba_{name}": value for name, value in STATES.items()},
    ),
    "lfm2": lambda: transformers.Lfm2Config(**SMALL, **HEADS, layer_types=["conv", "full_attention"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("length", [24, 23])
def test_models_of_transformers(name: str, length: int) -> None:
    """They compute their states in float32, whatever their dtype."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(REAL[name]()).double()
    ids = torch.randint(48, (2, length))
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    loss = model(**inputs).loss
    loss.backward()
    one = Result(loss.detach(), _grads(model))
    model.zero_grad()
    asked = [Asked(2, "ulysses"), Asked(3, "ring"), Asked(2, "megatron")]
    for ranks in on_pretended_ranks(model, inputs, asked).values():
        assert not ranks.context.result.fallbacks
        for result in ranks.results():
            assert_equal_to_one_device(one, result, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["blur attention", "shift attention"])
def test_ranks_of_two_mesh_dims_agree(layers: str) -> None:
    """Where ranks of the first dim have equal shares, and do not the same at their borders."""
    model, inputs = model_and_input(layers, 16)

    def use(gm: fx.GraphModule, example_inputs: list[Any]) -> None:
        options = Options(strategy=USP(2, 2), outputs="dtensor")
        for rank in range(4):
            _, context = rewrite_graph(gm, example_inputs, options, Mesh.pretended((2, 2), rank))
            assert not context.result.mesh_dims[0].result.is_even

    while_captured(model, use, **inputs)


def _sent(ranks: Ranks, rank: int) -> Counter[str]:
    context = ranks.graphs[rank].context
    found: Counter[str] = Counter()
    for collective in count_collectives(ranks.graphs[rank].graph_module.graph, context.mesh):
        found[collective.kind] += collective.bytes_sent
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "strategy"), [("chunks", "ulysses"), ("chunks", "ring"), ("tree", "ring")])
def test_what_is_sent_does_not_grow_with_the_sequence(layers: str, strategy: str) -> None:
    """Rows at the borders, and states: of 4 ranks the third has both neighbours."""
    asked = Asked(4, strategy)
    short, long = (ranks_of(layers, length, [asked])[1][asked] for length in (32, 128))
    assert _sent(short, 2) == _sent(long, 2)


@pytest.mark.slow
def test_a_hybrid_sends_no_more_for_its_state_spaces() -> None:
    """Under a ring what grows is what the ring sends."""
    asked = Asked(4, "ring")
    short, long = (ranks_of("chunks attention", length, [asked])[1][asked] for length in (32, 128))
    grown = _sent(long, 2) - _sent(short, 2)
    assert set(grown) == {"send_recv"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "grown"), [("mamba2", set()), ("bamba", {"all_to_all"})])
def test_models_of_transformers_send_no_more_for_their_state_spaces(name: str, grown: set[str]) -> None:
    """Labels that the loss shifts are no reason to gather what is divided in chunks."""
    model = transformers.AutoModelForCausalLM.from_config(REAL[name]()).double()
    found = []
    for length in (64, 128):
        ids = torch.randint(48, (2, length))
        asked = Asked(4, "ulysses")
        inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
        found.append(_sent(on_pretended_ranks(model, inputs, [asked])[asked], 1))
    assert set(found[1] - found[0]) == grown
