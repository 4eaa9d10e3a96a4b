"""Real models on real ranks: the loss and every gradient equal one device's.

Of one layer each, since compiling is what takes the time; on simulated ranks (`tests/test_simulated_models.py`) two.
"""

import pytest
import torch

from tests.equality import (
    assert_equal_to_one_device,
    one_device,
    one_device_without_one_label,
    one_layer_on_ranks,
    run_parallel,
    worst_error,
)
from tests.gloo_pool import get_pool
from tests.models import MODELS

pytestmark = pytest.mark.timeout(300)

INDUCTOR_TOLERANCE = 1e-5
# A mistake must exceed what is tolerated this many times, so that no test passes by its margin.
VISIBLE = 100.0


# every model on 2 ranks, some on one and on 4; the rest behind `make slow`
USUAL = {(2, name) for name in MODELS} | {(1, name) for name in ("bert", "llama", "sdpa_transformer")}
USUAL.add((4, "llama_mha_kv2"))
CASES = [
    pytest.param(world_size, name, marks=() if (world_size, name) in USUAL else pytest.mark.slow)
    for world_size in (1, 2, 4)
    for name in MODELS
]


@pytest.mark.parametrize(("world_size", "name"), CASES)
def test_ulysses_equals_one_device(world_size: int, name: str) -> None:
    for result in one_layer_on_ranks(name, world_size):
        assert_equal_to_one_device(one_device(name, layers=1), result, MODELS[name].tolerance)
        # A model that silently ran unsharded would be equal too.
        assert (sum(collective.sent_bytes for collective in result.forward) > 0) == (world_size > 1)


@pytest.mark.inductor
@pytest.mark.parametrize("name", ["llama", pytest.param("sdpa_transformer", marks=pytest.mark.slow)])
def test_ulysses_under_inductor_equals_one_device(name: str) -> None:
    results = get_pool(2).run(run_parallel, name, "ulysses", "inductor", torch.float32, 1, timeout=240)
    for result in results:
        assert_equal_to_one_device(one_device(name, torch.float32, 1), result, INDUCTOR_TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_one_missing_label_is_seen(name: str) -> None:
    """The comparison above can fail: the smallest mistake is far outside what it allows."""
    _, error = worst_error(one_device(name, layers=1), one_device_without_one_label(name, layers=1))
    assert error > VISIBLE * max(MODELS[name].tolerance, INDUCTOR_TOLERANCE)
