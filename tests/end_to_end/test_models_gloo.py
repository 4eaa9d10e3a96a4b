"""Real models on real ranks: the loss and every gradient equal one device's.

Of one layer each, since compiling is what takes the time; two on simulated ranks
(`tests/end_to_end/test_simulated_models.py`).
"""

import pytest
import torch

from tests.support.equality import (
    assert_equal_to_one_device,
    one_device,
    one_device_without_one_label,
    one_layer_on_ranks,
    run_parallel,
    worst_error,
)
from tests.support.gloo_pool import get_pool
from tests.support.models import MODELS
from tests.support.tiers import tiered

pytestmark = pytest.mark.timeout(300)

INDUCTOR_TOLERANCE = 1e-5
# A mistake must exceed what is tolerated this many times, so that no test passes by its margin.
VISIBLE = 100.0


# all of them are in lockstep too
CASES = tiered(
    [(world_size, name) for world_size in (1, 2, 4) for name in MODELS],
    quick=[(1, "sdpa_transformer"), (2, "llama"), (2, "sdpa_transformer")],
)


@pytest.mark.parametrize(("world_size", "name"), CASES)
def test_ulysses_equals_one_device(world_size: int, name: str) -> None:
    for result in one_layer_on_ranks(name, world_size):
        assert_equal_to_one_device(one_device(name, layers=1), result, MODELS[name].tolerance)
        # A model that silently ran unsharded would be equal too.
        assert (sum(collective.sent_bytes for collective in result.forward) > 0) == (world_size > 1)


@pytest.mark.inductor
@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "sdpa_transformer"])
def test_ulysses_under_inductor_equals_one_device(name: str) -> None:
    results = get_pool(2).run(run_parallel, name, "ulysses", "inductor", torch.float32, 1, timeout=240)
    for result in results:
        assert_equal_to_one_device(one_device(name, torch.float32, 1), result, INDUCTOR_TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_one_missing_label_is_seen(name: str) -> None:
    """The comparison above can fail: the smallest mistake is far outside what it allows."""
    _, error = worst_error(one_device(name, layers=1), one_device_without_one_label(name, layers=1))
    assert error > VISIBLE * max(MODELS[name].tolerance, INDUCTOR_TOLERANCE)
