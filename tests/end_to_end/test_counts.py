"""The collectives of a training step and their bytes: the closed forms, the rewritten graph, and real ranks agree.

Symbols: S tokens, B batch, H query heads, K key/value heads, D head dim, N ranks, c = S/N, a = (N-1)/N.
"""

import functools
from collections import Counter
from fractions import Fraction

import pytest

import sptransform
from sptransform import explanation_of
from sptransform.engine.traffic import Collective as Planned
from tests.support.collective_counts import Collective as Ran
from tests.support.equality import one_layer_on_ranks
from tests.support.models import HEADS, HIDDEN, LAYERS, build
from tests.support.rewritten import rewritten_model
from tests.support.tiers import tiered

pytestmark = pytest.mark.timeout(240)

B, S, H, D = 2, 64, HEADS, HIDDEN // HEADS
FLOAT64, FLOAT32 = 8, 4
# K, and the bytes of one loss entry: Hugging Face's causal models compute the loss in float32
MODELS = {
    "bert": (8, FLOAT64),
    "gpt2": (8, FLOAT32),
    "llama": (4, FLOAT32),
    "llama_mha_kv2": (2, FLOAT32),  # at four ranks two of them read the same key head
    "llama_nocache": (4, FLOAT32),  # its attention reads keys repeated to all query heads: they travel un-repeated
}
CASES = [(name, N) for name in MODELS for N in (2, 4)]
RUN_NAMES = {"all_to_all": "all_to_all_single", "all_reduce": "all_reduce"}


def sent_by_attention(K: int, N: int) -> list[Fraction]:
    """Elements one rank sends in one layer, in the two all-to-alls of a direction: Q, K and V, then the output."""
    c, a = Fraction(S, N), Fraction(N - 1, N)
    output = H * B * c * D * a
    if K % N == 0:
        packed = (H + 2 * K) * B * c * D * a
        assert packed + output == 2 * (H + K) * B * c * D * a
    else:
        packed = (Fraction(H, N) + 2) * B * S * D * a
        assert packed + output == (Fraction(2 * H, N) + 2) * B * S * D * a
    return [packed, output]


def sent_by_all_reduce(num_elements: int, N: int) -> Fraction:
    """Elements one rank sends: a reduce-scatter and an all-gather."""
    return 2 * num_elements * Fraction(N - 1, N)


def expected(name: str, N: int) -> list[tuple[str, str, Fraction]]:
    """(kind, direction, bytes) of everything a training step sends, in order."""
    K, loss_size = MODELS[name]
    model, _ = build(name)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    forward = [("all_to_all", "forward", FLOAT64 * sent) for _ in range(LAYERS) for sent in sent_by_attention(K, N)]
    loss = ("all_reduce", "forward", loss_size * sent_by_all_reduce(1, N))
    backward = [(kind, "backward", sent) for kind, _, sent in reversed(forward)]
    gradients = ("all_reduce", "backward", FLOAT64 * sent_by_all_reduce(num_parameters, N))  # one bucket
    return [*forward, loss, *backward, gradients]


@functools.cache
def planned(name: str, N: int, layers: int = LAYERS) -> list[Planned]:
    return list(explanation_of(rewritten_model(name, "ulysses", N, layers=layers)).collectives)


@pytest.mark.parametrize(("name", "N"), CASES)
def test_graph_sends_what_the_closed_forms_say_and_nothing_else(name: str, N: int) -> None:
    assert [(c.kind, c.direction, c.bytes_sent) for c in planned(name, N)] == expected(name, N)
    assert all(c.count == 1 for c in planned(name, N))


@pytest.mark.parametrize(("name", "N"), CASES)
def test_each_attention_layer_has_two_all_to_alls_in_each_direction(name: str, N: int) -> None:
    exchanges = Counter((c.layer, c.direction) for c in planned(name, N) if c.kind == "all_to_all")
    assert len(exchanges) == 2 * LAYERS
    assert set(exchanges.values()) == {2}


@pytest.mark.parametrize(
    ("name", "N"),
    tiered(CASES, quick=[("llama", 2)]),
)
def test_real_ranks_send_what_the_graph_says(name: str, N: int) -> None:
    for result in one_layer_on_ranks(name, N):
        for direction, collectives in (("forward", result.forward), ("backward", result.backward)):
            plan = [(RUN_NAMES[c.kind], c.bytes_sent) for c in planned(name, N, layers=1) if c.direction == direction]
            assert [(c.name, c.sent_bytes) for c in collectives] == plan


@pytest.mark.slow
@pytest.mark.parametrize("N", [2, 4])
def test_repeated_keys_cost_no_more_than_keys_as_they_are(N: int) -> None:
    def sent(name: str) -> list[Ran]:
        return [c for c in one_layer_on_ranks(name, N)[0].forward if c.name == "all_to_all_single"]

    assert [c.sent_bytes for c in sent("llama_nocache")] == [c.sent_bytes for c in sent("llama")]


def test_frozen_parameters_send_nothing() -> None:
    model, inputs = build("gpt2")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("transformer.h.0."))
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    assert trained < sum(parameter.nbytes for parameter in model.parameters())
    collectives = explanation_of(sptransform.rewrite(model, "ulysses", inputs, world_size=2)).collectives
    gradients = [c for c in collectives if c.kind == "all_reduce" and c.direction == "backward"]
    assert [c.bytes_sent for c in gradients] == [sent_by_all_reduce(trained, 2)]
