"""Every model's rewritten graph on simulated ranks, all in this process: loss and gradients equal one device's.

One graph runs for all ranks, so it must be the same on all: a model whose sequence does not divide evenly has its
ranks' sizes in its graphs, and is left to the tests on real ranks.
"""

import pytest

from sptransform.ops.simulation import register
from tests.support.equality import assert_equal_to_one_device, one_device
from tests.support.models import MODELS
from tests.support.rewritten import run_on_ranks, simulated_graph
from tests.support.tiers import tiered

pytestmark = pytest.mark.timeout(60)

# It slices its logits to [:, :-1], so that the last rank has one fewer.
UNEVEN = {"sdpa_transformer"}


@pytest.fixture(autouse=True, scope="module")
def _ops_know_the_simulation() -> None:
    register()


CASES = [(name, num_ranks) for name in MODELS if name not in UNEVEN for num_ranks in (2, 4, 8)]


@pytest.mark.parametrize(
    ("name", "num_ranks"),
    tiered(CASES, quick=[("gpt2", 4), ("llama_mha_kv2", 8)]),
)
def test_rewritten_graph_equals_one_device(name: str, num_ranks: int) -> None:
    results = run_on_ranks(simulated_graph(name, num_ranks), num_ranks)
    assert len(results) == num_ranks
    for result in results:
        assert_equal_to_one_device(one_device(name), result, MODELS[name].tolerance)
