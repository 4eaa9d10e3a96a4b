"""Windows as arguments of kernels. Those of GPUs are stand-ins, see `tests/support/cuda_stand_ins.py`."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from sptransform.ops.ring import kernel_name
from sptransform.ops.ring.kernels.interface import Case
from sptransform.ops.ring.kernels.table import choose, has_windows
from sptransform.sharding.partition import Partition
from tests.ops.ring.ranks import Problem, Ring, assert_equal, one_device, visible
from tests.support.cuda_stand_ins import Calls, on_cpu, pretend_cuda

sp = torch.ops.sptransform

KERNELS = ["flash-attn", "CUDA flash", "PyTorch reference"]
# causal, sliding, the window as flash-attn says it for 5 queries and 8 keys
RUNS = {"opens": (True, False, (-1, 0)), "closes": (False, True, (3, -1)), "both": (True, True, (3, 0))}


@pytest.fixture
def calls(kernel: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """What was called of the kernel, which is the one that is chosen for float64."""
    if kernel == "PyTorch reference":
        yield Calls()
        return
    with on_cpu(kernel, monkeypatch) as calls:
        assert choose(Case.of(torch.empty(1, 1, 1, 8).double(), torch.empty(1, 1, 1, 8), masked=False, explicit=False,
                              softcap=0.0, windowed=True)).name == kernel  # fmt: skip
        yield calls


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("num_queries", "num_keys"), [(5, 8), (5, 5), (1, 4)])
def test_every_pair_of_a_run(run: str, num_queries: int, num_keys: int, calls: Calls) -> None:
    """The three kinds of runs: query n sees the keys from n on, or up to t - s + n, or both."""
    causal, sliding, window = RUNS[run]
    problem = Problem.random(num_queries, num_keys)
    shown = visible(num_queries, num_keys, num_queries - num_keys if causal else None, 0 if sliding else None)
    xs = problem.query, problem.key, problem.value
    out, lse = sp.attention_block(*xs, None, causal, scale=0.3, sliding=sliding)
    grads = sp.attention_block_backward(problem.grad, *xs, None, out, lse, causal, scale=0.3, sliding=sliding)
    assert_equal((out, list(grads)), one_device(problem, shown, scale=0.3))
    scores = problem.query @ problem.key.repeat_interleave(2, 1).mT * 0.3
    torch.testing.assert_close(lse, scores.masked_fill(~shown, -torch.inf).logsumexp(-1), atol=1e-12, rtol=1e-12)
    if (num_queries, num_keys) == (5, 8):
        assert {limits for _, _, limits in calls} <= {window}


@pytest.mark.parametrize("kernel", ["PyTorch reference"])
@pytest.mark.parametrize("run", RUNS)
def test_tiles_of_the_definition(run: str, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sptransform.ops.ring.kernels.reference.TILE", 3)
    for num_queries, num_keys in ((8, 13), (7, 7)):
        test_every_pair_of_a_run(run, num_queries, num_keys, calls)


@pytest.mark.covering(ways=2)
@pytest.mark.parametrize("kernel", KERNELS[:2])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("limits", [(0, 4), (0, 11), (-3, 3), (0, None), (None, 2), (2, 9)], ids=str)
def test_rings_without_a_mask(
    num_ranks: int, layout: str, limits: tuple[int | None, int | None], calls: Calls
) -> None:
    """No call has a mask, forward or backward."""
    nearest, farthest = limits
    partition = getattr(Partition, layout)(26, num_ranks)
    ring = Ring(partition, partition, options={"nearest": nearest, "farthest": farthest})
    problem = Problem.random(26)
    with mock.patch("torch.ops.sptransform.band_mask", side_effect=AssertionError("a mask was made")):
        found = ring.run(problem)
    assert_equal(found, one_device(problem, visible(26, 26, nearest, farthest)))
    assert any(limits[0] >= 0 for *_, limits in calls) == (farthest is not None)


@pytest.mark.parametrize("kernel", KERNELS[:1])
def test_softcaps_have_windows(calls: Calls) -> None:
    problem, partition = Problem.random(26), Partition.zigzag(26, 2)
    options = {"nearest": 0, "farthest": 6, "softcap": 0.7}
    found = Ring(partition, partition, options=options).run(problem)
    with mock.patch.object(Case, "of", lambda *args, **options: Case("cpu", torch.float64, 8, 8, False, True)):
        exact = Ring(partition, partition, options=options).run(problem)
    assert_equal(found, exact)
    assert {name for name, *_ in calls} == {"_flash_attn_forward", "_flash_attn_backward"}


@pytest.mark.parametrize("kernel", KERNELS[1:2])
def test_torch_flash_is_called_below_only_for_windows(calls: Calls) -> None:
    problem, partition = Problem.random(24), Partition.zigzag(24, 3)
    Ring(partition, partition, options={"nearest": 0}).run(problem)
    assert {name.removesuffix("_backward") for name, *_ in calls} == {"_scaled_dot_product_flash_attention"}


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case("cpu", torch.float32, 64, 64, False, False), False),
        (Case("cpu", torch.float32, 64, 32, False, False), True),
        (Case("cuda", torch.bfloat16, 64, 64, False, False), True),
        (Case("cuda", torch.bfloat16, 192, 128, False, False), False),
        (Case("cuda", torch.float32, 64, 64, False, False), False),
    ],
    ids=str,
)
def test_kernels_with_windows(case: Case, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sptransform.ops.ring.kernels.cuda._capability", lambda: (9, 0))
    monkeypatch.setattr("sptransform.ops.ring.kernels.cuda.has_flash_attn", lambda: False)
    assert has_windows(case) == expected


def test_windows_that_no_kernel_has() -> None:
    query, key, mask = torch.zeros(1, 1, 5, 8), torch.zeros(1, 1, 4, 8), torch.zeros(4, 4)
    with pytest.raises(ValueError, match="a window of 4 keys over 5 queries"):
        sp.attention_block(query, key, key, None, True)
    with pytest.raises(ValueError, match="beside a mask"):
        sp.attention_block(key, key, key, mask, False, sliding=True)


def test_the_name_of_the_kernel_of_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.empty(1, 2, 3, 8)
    assert kernel_name(query, query) == "CPU flash"
    pretend_cuda(monkeypatch)
    assert kernel_name(query.bfloat16(), query) == "CUDA flash"
