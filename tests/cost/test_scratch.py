"""What kernels hold while they run, as counted without running them and as the profiler sees it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree

from sptransform import rewrite
from sptransform.cost import scratch
from sptransform.cost.read import step_of
from sptransform.cost.scratch import scratch_of
from tests.support.memory_held import memory_held

aten, sp = torch.ops.aten, torch.ops.sptransform
HEADS, LENGTH, DIM = 4, 640, 32


def held_beside_results(call: Callable[[], Any]) -> int:
    gc.collect()
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        results = call()
    peak, kept = memory_held(found)
    del results
    return peak - kept


def block(backward: bool, mask: Tensor | None = None, dtype: torch.dtype = torch.float32) -> list[Any]:
    shape = 1, HEADS, LENGTH, DIM
    query, key, value = (torch.rand(shape).to(dtype) for _ in range(3))
    if not backward:
        return [query, key, value, mask]
    return [torch.rand(shape), query, key, value, mask, torch.rand(shape), torch.rand(shape[:3], dtype=torch.float64)]


BIAS = torch.zeros(HEADS, LENGTH, LENGTH)
DROPOUT = {"dropout_p": 0.1, "seed": torch.tensor(3)}
x = torch.rand(256, 1024)


@pytest.mark.parametrize(
    ("op", "args", "options"),
    [
        (sp.attention_block, [*block(False), True], DROPOUT),
        (sp.attention_block, [*block(False, dtype=torch.bfloat16), False], {"softcap": 5.0}),
        (sp.attention_block, [*block(False, BIAS), False], {}),
        (sp.attention_block_backward, [*block(True), True], DROPOUT),
        (sp.attention_block_backward_with_mask, [*block(True, BIAS), False], {}),
        (aten.add, [x, x], {}),
        (aten.logsumexp, [x, [-1]], {}),
        (aten.mul, [x, x > 0], {}),
        (aten.sum, [x > 0, [-1]], {}),
        (aten.sum, [x, [-1]], {}),
    ],
    ids=lambda value: str(value) if callable(value) else "",
)
def test_what_a_kernel_holds_is_what_it_allocates(op: Any, args: list[Any], options: dict[str, Any]) -> None:
    held = held_beside_results(lambda: op(*args, **options))
    mode = FakeTensorMode()
    fakes = pytree.tree_map_only(Tensor, mode.from_tensor, (tuple(args), options))
    # beside it, flash attention on a CPU has a buffer a thread
    assert scratch_of(op, *fakes) == pytest.approx(held, rel=0.05, abs=2**15)


@pytest.mark.parametrize("causal", [True, False])
def test_many_rows_are_counted_from_few(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    with FakeTensorMode():
        xs = [torch.empty(1, HEADS, size, DIM) for size in (8192, 8192 + 512, 8192 + 512)]
    found = []
    for longest in (scratch._LONG, 10**6):
        monkeypatch.setattr(scratch, "_LONG", longest)
        found.append(scratch_of(sp.attention_block, (*xs, None, causal), {"softcap": 5.0}))
    assert found[0] == pytest.approx(found[1], rel=0.03)


@pytest.mark.parametrize("factors", [(1, 1.0), (1.0, 1)])
def test_calls_with_equal_numbers_of_other_types_are_counted_apart(factors: tuple[float, ...]) -> None:
    class Scaled(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(x * factor for factor in factors)

    inputs = (torch.ones(8, 64, dtype=torch.int64),)
    step = step_of(rewrite(Scaled(), "ulysses", inputs, world_size=2, sequence_dims={"x": 1}), fuse=False)
    held = [work.scratch for work in step.works if work.op.startswith("aten.mul")]
    assert held == [8 * 64 * 4 if isinstance(factor, float) else 0 for factor in factors]
