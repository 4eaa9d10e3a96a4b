"""Text generation with a parallelized model: the tokens of one device, and a word that nothing is sharded."""

import logging

import pytest
import torch
from transformers import DynamicCache

import sptransform
from tests.support.collective_counts import CountCollectives
from tests.support.equality import Result, assert_equal_to_one_device, run_one_device
from tests.support.gloo_pool import get_pool
from tests.support.models import MODELS, build
from tests.support.tiers import tiered

pytestmark = pytest.mark.timeout(240)

NEW = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def prompt(name: str) -> torch.Tensor:
    return build(name, layers=1)[1]["input_ids"][:, :16]


def generate(rank: int, world_size: int, name: str, **options: object) -> tuple[torch.Tensor, list[str], int]:
    """The tokens, what was logged, and the number of collectives."""
    model = sptransform.parallelize(build(name, layers=1)[0], "ulysses", backend="aot_eager")
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("sptransform").addHandler(handler)
    try:
        with CountCollectives() as counted:
            tokens = model.generate(prompt(name), **NEW, **options)
    finally:
        logging.getLogger("sptransform").removeHandler(handler)
    return tokens, [m for m in messages if "cache" in m], len(counted.collectives)


@pytest.mark.parametrize("name", tiered(["llama", "gpt2"], quick=["llama"]))
def test_greedy_generation_gives_the_tokens_of_one_device_and_says_that_it_is_not_sharded(name: str) -> None:
    expected = build(name, layers=1)[0].generate(prompt(name), **NEW)
    for tokens, messages, num_collectives in get_pool(2).run(generate, name):
        assert torch.equal(tokens, expected)
        assert num_collectives == 0
        assert len(messages) == 1 and "not sharded" in messages[0]


@pytest.mark.slow
def test_sampling_and_beams_draw_the_same_on_ranks_seeded_alike() -> None:
    for options in ({"do_sample": True, "temperature": 1.0}, {"num_beams": 2}):
        torch.manual_seed(0)
        expected = build("llama", layers=1)[0].generate(prompt("llama"), **NEW | options)
        for tokens, _, _ in get_pool(2).run(generate_seeded, options):
            assert torch.equal(tokens, expected)


def generate_seeded(rank: int, world_size: int, options: dict[str, object]) -> tuple[torch.Tensor, list[str], int]:
    torch.manual_seed(0)
    model = sptransform.parallelize(build("llama", layers=1)[0], "ulysses", backend="aot_eager")
    return model.generate(prompt("llama"), **NEW | options), [], 0


def trains_after_generating(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    model, inputs = build("llama", layers=1)
    sptransform.parallelize(model, "ulysses", backend="aot_eager")
    before = model(**inputs).loss.detach()
    model.generate(inputs["input_ids"][:, :16], **NEW)
    with CountCollectives() as counted:
        after = model(**inputs).loss.detach()
    return before, after, len(counted.collectives)


@pytest.mark.slow
def test_generating_between_steps_leaves_training_sharded() -> None:
    for before, after, num_collectives in get_pool(2).run(trains_after_generating):
        assert torch.equal(before, after)
        assert num_collectives > 0


def cached_by_position(rank: int, world_size: int) -> tuple[torch.Tensor, int]:
    """A cache that the user passes by position, without gradients."""
    model, inputs = build("llama", layers=1)
    sptransform.parallelize(model.eval(), "ulysses", backend="aot_eager")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(inputs["input_ids"][:, :16], None, None, cache)
        with CountCollectives() as counted:
            logits = model(inputs["input_ids"][:, 16:17], None, None, cache).logits
    return logits, len(counted.collectives)


def test_a_cache_of_the_users_own() -> None:
    model, inputs = build("llama", layers=1)
    with torch.no_grad():
        expected = model.eval()(inputs["input_ids"][:, :17]).logits[:, -1:]
    for logits, num_collectives in get_pool(2).run(cached_by_position):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        assert num_collectives == 0


def given(model: torch.nn.Module) -> DynamicCache:
    """Keys and values of a prefix, learned elsewhere."""
    generator, config = torch.Generator().manual_seed(0), model.config
    shape = (2, config.num_key_value_heads, 8, config.hidden_size // config.num_attention_heads)
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        cache.update(*torch.randn(2, *shape, generator=generator, dtype=torch.float64), layer)
    return cache


def trains_behind_a_prefix(rank: int, world_size: int) -> Result:
    model, inputs = build("llama", layers=1)
    sptransform.parallelize(model, "ulysses", backend="aot_eager")
    with CountCollectives() as counted:
        result = run_one_device(model, inputs | {"past_key_values": given(model)})
    assert counted.collectives
    return result


def test_training_with_a_cache_is_sharded() -> None:
    model, inputs = build("llama", layers=1)
    reference = run_one_device(model, inputs | {"past_key_values": given(model)})
    for result in get_pool(2).run(trains_behind_a_prefix):
        assert_equal_to_one_device(reference, result, MODELS["llama"].tolerance)
