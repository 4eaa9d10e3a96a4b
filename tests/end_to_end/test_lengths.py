"""Lengths that change between calls: one graph for all that the ranks share evenly, another compile for others."""

import logging
import random
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from sptransform.capture.torch_versions import own_limit
from tests.support.equality import Result, assert_equal_to_one_device, run_one_device
from tests.support.gloo_pool import get_pool
from tests.support.models import FLOAT64, MODELS, VOCAB, build
from tests.support.tiers import tiered
from tests.support.tiny import attention, attention_with_loss

pytestmark = pytest.mark.timeout(300)


def run_lengths(
    rank: int, world_size: int, name: str, lengths: list[int], strategy: str = "ulysses"
) -> tuple[list[Result], int]:
    """One parallelized model called with every length; its results, and how often it was compiled."""
    from torch._dynamo.utils import counters

    import sptransform

    counters.clear()
    model, _ = build(name, layers=1)
    sptransform.parallelize(model, strategy, backend="aot_eager")
    results = []
    for length in lengths:
        _, inputs = build(name, seq_len=length)
        model.zero_grad()
        results.append(run_one_device(model, inputs))
    return results, counters["stats"]["unique_graphs"]


def run_uneven(
    rank: int, world_size: int, lengths: list[int], limit: int, strategy: str = "ulysses"
) -> tuple[list[Result], int, int]:
    """Results of every length, how often the model was compiled, and how often it warned of that."""
    from torch._dynamo.utils import counters

    import sptransform
    from sptransform.compiler.compiles import log

    counters.clear()
    warned: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = warned.append  # type: ignore[method-assign]
    log.addHandler(handler)
    model = sptransform.parallelize(attention_with_loss(), strategy, backend="eager")
    try:
        with torch._dynamo.config.patch(recompile_limit=limit):
            results = [step(model, length) for length in lengths]
    finally:
        log.removeHandler(handler)
    return results, counters["stats"]["unique_graphs"], len(warned)


def step(model: torch.nn.Module, length: int) -> Result:
    model.zero_grad()
    return run_one_device(model, {"tokens": tokens(length), "labels": tokens(length + 1)[:, 1:]})


def tokens(length: int) -> torch.Tensor:
    return torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(length))


def run_logits(rank: int, world_size: int, lengths: list[int]) -> list[tuple[bool, torch.Tensor]]:
    """Logits of every length: whether they came as DTensors, and the whole of them."""
    import sptransform

    model = sptransform.parallelize(attention(), "ulysses", backend="aot_eager")
    return [is_dtensor_and_whole(model(tokens(length))) for length in lengths]


def run_logits_of_llama(rank: int, world_size: int, lengths: list[int]) -> list[tuple[bool, torch.Tensor]]:
    import sptransform

    model = sptransform.parallelize(build("llama_nocache", layers=1)[0], "ulysses", backend="aot_eager")
    inputs = [build("llama_nocache", seq_len=length)[1] for length in lengths]
    return [is_dtensor_and_whole(model(**each).logits) for each in inputs]


def is_dtensor_and_whole(logits: Any) -> tuple[bool, torch.Tensor]:
    return isinstance(logits, DTensor), logits.full_tensor().detach()


def assert_lengths_equal(
    name: str, num_ranks: int, lengths: list[int], most_compiles: int, strategy: str = "ulysses"
) -> None:
    for results, num_compiles in get_pool(num_ranks).run(run_lengths, name, lengths, strategy, timeout=200):
        assert num_compiles <= most_compiles
        for length, result in zip(lengths, results, strict=True):
            model, inputs = build(name, seq_len=length, layers=1)
            assert_equal_to_one_device(run_one_device(model, inputs), result, MODELS[name].tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "llama_padded", "bert", "gpt2", "torch_encoder"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_five_lengths_compile_at_most_twice(name: str, num_ranks: int) -> None:
    """Torch makes the length symbolic at its second value, and the graph of it serves all the others."""
    lengths = random.Random(num_ranks).sample(range(2 * num_ranks, 129, num_ranks), 5)
    assert_lengths_equal(name, num_ranks, lengths, most_compiles=2)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ring", "allgather", "usp", "megatron", "ulysses"])
@pytest.mark.parametrize("name", ["llama_nocache", "llama_padded"])
def test_a_dozen_lengths_of_a_masked_model_compile_at_most_twice(name: str, strategy: str) -> None:
    """Masks are read for any length, so the recompile limit of eight is never met."""
    lengths = random.Random(7).sample(range(8, 129, 4), 12)
    assert_lengths_equal(name, 2, lengths, most_compiles=2, strategy=strategy)


@pytest.mark.parametrize(
    ("lengths", "limit", "num_warnings"),
    tiered([([9, 11, 16, 13, 12, 15, 20, 17], 3, 1), ([9, 16, 12, 8, 20], 3, 0)], quick=[([9, 16, 12, 8, 20], 3, 0)]),
)
def test_uneven_lengths_are_not_refused_for_their_number(lengths: list[int], limit: int, num_warnings: int) -> None:
    """Each is a compile, beside the one or two of all others; more of them than Dynamo's limit are a warning."""
    assert_uneven(lengths, limit, num_warnings)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ring", "allgather", "usp", "megatron", "ulysses"])
def test_two_dozen_lengths_of_which_half_are_uneven(strategy: str) -> None:
    draw = random.Random(8)
    lengths = [*draw.sample(range(9, 65, 2), 12), *draw.sample(range(8, 65, 4), 12)]
    draw.shuffle(lengths)
    assert_uneven(lengths, 8, 1, strategy)


def assert_uneven(lengths: list[int], limit: int, num_warnings: int, strategy: str = "ulysses") -> None:
    num_uneven = sum(length % 2 for length in lengths)
    for results, num_compiles, warned in get_pool(2).run(run_uneven, lengths, limit, strategy, timeout=240):
        assert num_uneven < num_compiles <= num_uneven + 2 and warned == num_warnings
        for length, result in zip(lengths, results, strict=True):
            assert_equal_to_one_device(step(attention_with_loss(), length), result, FLOAT64)


@pytest.mark.slow
def test_a_length_the_ranks_do_not_share_evenly_is_compiled_for_itself() -> None:
    assert_lengths_equal("llama_nocache", 3, [63, 61, 30], most_compiles=3)


@pytest.mark.slow
def test_a_clipped_sequence_is_compiled_for_every_length() -> None:
    """``x[:, :-1]`` gives the last rank one less: sizes in its graph are those of one length."""
    assert_lengths_equal("sdpa_transformer", 2, [64, 32, 48], most_compiles=3)


def test_dtensors_have_the_length_of_their_call() -> None:
    lengths = [64, 32, 48]
    for found in get_pool(2).run(run_logits, lengths, timeout=200):
        for length, (is_dtensor, logits) in zip(lengths, found, strict=True):
            assert is_dtensor
            torch.testing.assert_close(logits, attention()(tokens(length)).detach(), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_dtensors_of_llama_have_the_length_of_their_call() -> None:
    lengths = [64, 32, 48]
    for found in get_pool(2).run(run_logits_of_llama, lengths, timeout=200):
        for length, (is_dtensor, logits) in zip(lengths, found, strict=True):
            model, inputs = build("llama_nocache", seq_len=length, layers=1)
            assert is_dtensor
            torch.testing.assert_close(logits, model(**inputs).logits.detach(), rtol=1e-5, atol=1e-6)


class Times(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = attention_with_loss()

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor, number: float) -> torch.Tensor:
        return self.model(tokens, labels) * number


def run_numbers(rank: int, world_size: int) -> int:
    """How many calls ran, each with another number, and another length of those that one graph serves."""
    import sptransform
    from sptransform.diagnostics.errors import UsageError

    model = sptransform.parallelize(Times(), "ulysses", backend="eager")
    with torch._dynamo.config.patch(recompile_limit=3), torch.no_grad():
        for at in range(8):
            length = 8 + 4 * at
            try:
                model(tokens(length), tokens(length + 1)[:, 1:], 1 / (at + 2))
            except UsageError:
                return at
    return 8


def test_lengths_that_one_graph_serves_are_no_further_sizes() -> None:
    """The first length is one size, all others are another."""
    assert get_pool(2).run(run_numbers, timeout=120) == [4, 4]


def run_two_models(rank: int, world_size: int, fullgraph: bool) -> int:
    """A policy and its reference, say: Dynamo has the compiles of both, which are of one class, at one code object."""
    import sptransform

    options = {"backend": "eager", "fullgraph": fullgraph}
    models = [sptransform.parallelize(attention_with_loss(), "ulysses", **options) for _ in range(2)]
    num_calls = 0
    with torch._dynamo.config.patch(recompile_limit=3, accumulated_recompile_limit=6), torch.no_grad():
        for length in range(9, 19, 2):
            for model in models:
                model(tokens(length), tokens(length + 1)[:, 1:])
                num_calls += 1
    return num_calls


@pytest.mark.skipif(not own_limit(), reason="this torch has one limit for all models of a class")
@pytest.mark.slow
@pytest.mark.parametrize("fullgraph", [True, False])
def test_models_of_one_class_have_their_lengths_each(fullgraph: bool) -> None:
    assert get_pool(2).run(run_two_models, fullgraph) == [10, 10]
