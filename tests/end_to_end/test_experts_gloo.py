"""A mixture of experts on real ranks, compiled by Inductor: rows are sorted, and moved, in its kernels."""

from __future__ import annotations

import pytest
import torch

import sptransform
from tests.strategies.test_experts import EXPERTS, made
from tests.support.equality import Result, assert_equal_to_one_device, run_one_device
from tests.support.gloo_pool import get_pool

pytestmark = [pytest.mark.timeout(300), pytest.mark.inductor, pytest.mark.slow]

# of what is summed in 8 and in 24 bits
TOLERANCES = {torch.bfloat16: 3e-2, torch.float32: 1e-5}


def run(rank: int, world_size: int, strategy: str, dtype: torch.dtype) -> Result:
    """In bfloat16 the kernel is torch's own."""
    model, inputs = made(EXPERTS["qwen3"], dtype)
    model.set_experts_implementation("grouped_mm")
    return run_one_device(sptransform.parallelize(model, strategy, backend="inductor"), inputs)


@pytest.mark.parametrize(
    ("strategy", "dtype"), [("ulysses", torch.float32), ("megatron", torch.float32), ("ring", torch.bfloat16)]
)
def test_inductor_equals_one_device(strategy: str, dtype: torch.dtype) -> None:
    model, inputs = made(EXPERTS["qwen3"], dtype)
    model.set_experts_implementation("grouped_mm")
    reference = run_one_device(model, inputs)
    for result in get_pool(2).run(run, strategy, dtype, timeout=240):
        assert_equal_to_one_device(reference, result, TOLERANCES[dtype])
