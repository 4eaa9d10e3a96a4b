"""Block attention, its backward and the merge, against torch's own attention; and which kernel is chosen."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from sptransform.ops.ring import kernel_name
from sptransform.ops.ring.blocks import merge_block_
from sptransform.ops.ring.kernels import cuda
from sptransform.ops.ring.kernels.interface import Case, aligned_rows
from sptransform.ops.ring.kernels.reference import OPEN
from sptransform.ops.ring.kernels.table import TABLE, choose, has_windows, varlen_of
from tests.ops.ring.ranks import Problem, assert_equal, one_device
from tests.support.cuda_stand_ins import flash_attn_on_cpu

sp = torch.ops.sptransform

SIZES = (7, 11)
MASKS: dict[str, Tensor] = {}


def _masks() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    some = torch.rand(2, 4, *SIZES, generator=generator) > 0.4
    some[:, :, 2] = False  # a row that sees nothing
    added = torch.randn(1, 1, *SIZES, generator=generator, dtype=torch.float64)
    added[..., 3, :] = -math.inf
    added[..., 5, 4:] = -1e30
    sunk = torch.zeros(2, 1, *SIZES, dtype=torch.float64)
    sunk[0, 0, 1], sunk[1, 0, 4] = torch.finfo(torch.float64).min, -1e30
    levels = torch.zeros(2, 1, *SIZES, dtype=torch.float64)
    levels[0, 0, 1, :4], levels[0, 0, 1, 4:] = -2e30, -1e30
    levels[1, 0, 4], levels[1, 0, 4, ::3] = -1e30, -1e20
    levels[0, 0, 6] = -200.0 - torch.arange(SIZES[1])
    return {
        "of rows and heads": some,
        "of keys": torch.tensor([[True] * 8 + [False] * 3]),
        "of queries": (torch.arange(SIZES[0]) != 3)[:, None],
        "added": added,
        "rows below all": sunk,
        "rows of several levels": levels,
    }


MASKS = _masks()


def blockwise(problem: Problem, cuts: list[int], mask: Tensor | None = None, **options) -> tuple[Tensor, list[Tensor]]:
    """The op over the keys in several blocks, merged."""
    out = torch.zeros(*problem.query.shape[:3], problem.value.shape[-1], dtype=problem.query.dtype)
    lse = torch.full(problem.query.shape[:3], -math.inf, dtype=torch.float64)
    if mask is not None:
        mask = mask.expand(*mask.shape[:-1], problem.key.shape[2])
    blocks = [
        (problem.key[:, :, a:b], problem.value[:, :, a:b], None if mask is None else mask[..., a:b])
        for a, b in itertools.pairwise([0, *cuts, problem.key.shape[2]])
    ]
    for key, value, part in blocks:
        found = sp.attention_block(problem.query, key, value, part, False, **options)
        merge_block_(out, lse, *found, 0, mask is not None and mask.is_floating_point())
    grads = [
        sp.attention_block_backward(problem.grad, problem.query, key, value, part, out, lse, False, **options)
        for key, value, part in blocks
    ]
    of_query, of_key, of_value = zip(*grads, strict=True)
    return out, [sum(of_query), torch.cat(of_key, 2), torch.cat(of_value, 2)]


def expected(problem: Problem, mask: Tensor | None, **options) -> tuple[Tensor, list[Tensor]]:
    """One device, by the definition: its fused kernel takes probabilities of rows below all for 1 in backward."""
    xs = [x.detach().requires_grad_() for x in (problem.query, problem.key, problem.value)]
    heads = options.get("key_head_of") or [i * 2 // 4 for i in range(4)]
    key, value = (x[:, heads] for x in xs[1:])
    scores = xs[0] @ key.mT * (options.get("scale") or problem.query.shape[-1] ** -0.5)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    out = torch.ops.aten._safe_softmax(scores, -1) @ value
    return out.detach(), list(torch.autograd.grad(out, xs, problem.grad))


@pytest.mark.parametrize("name", [None, *MASKS])
@pytest.mark.parametrize("cuts", [[], [4], [1, 8]], ids=str)
@pytest.mark.parametrize("value_dim", [8, 5])
def test_blocks_are_the_whole(name: str | None, cuts: list[int], value_dim: int) -> None:
    problem = Problem.random(*SIZES, value_dim=value_dim)
    mask = MASKS.get(name)
    found = blockwise(problem, cuts, mask)
    assert_equal(found, expected(problem, mask))
    if name not in ("rows below all", "rows of several levels"):
        assert_equal(found, one_device(problem, mask))
    else:  # the value is the same there
        torch.testing.assert_close(found[0], one_device(problem, mask)[0], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("key_head_of", [[], [1, 1, 0, 1], [0, 0, 1, 1]], ids=str)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_options(key_head_of: list[int], scale: float | None) -> None:
    problem = Problem.random(*SIZES)
    found = blockwise(problem, [5], scale=scale, key_head_of=key_head_of)
    assert_equal(found, one_device(problem, scale=scale, key_head_of=key_head_of))


@pytest.mark.parametrize("value_dim", [8, 5])
@pytest.mark.parametrize("layout", ["heads first", "heads inside", "columns"])
def test_causal(value_dim: int, layout: str) -> None:
    """Tensors as they come: also such whose rows do not lie in one piece, which kernels would misread."""
    problem = Problem.random(9, value_dim=value_dim)
    if layout == "heads inside":
        problem = Problem(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in vars(problem).values()))
    elif layout == "columns":
        problem = Problem(*(x.mT.contiguous().mT for x in vars(problem).values()))
    xs = problem.query, problem.key, problem.value
    out, lse = sp.attention_block(*xs, None, True)
    grads = sp.attention_block_backward(problem.grad, *xs, None, out, lse, True)
    assert_equal((out, list(grads)), one_device(problem, torch.ones(9, 9, dtype=torch.bool).tril()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_are_float32(dtype: torch.dtype) -> None:
    problem = Problem.random(*SIZES, dtype=dtype)
    xs = problem.query, problem.key, problem.value
    out, lse = sp.attention_block(*xs, MASKS["of keys"], False)
    grads = sp.attention_block_backward(problem.grad, *xs, MASKS["of keys"], out, lse, False)
    assert {x.dtype for x in (out, *grads)} == {torch.float32} and lse.dtype == torch.float64
    whole = expected(problem.to(torch.float64), MASKS["of keys"])
    torch.testing.assert_close(out.double(), whole[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("low", [-100.0, -1e4, -1e7, -1e8, -1e9, 1e4, 1e7])
def test_a_row_of_large_numbers_keeps_its_digits(low: float) -> None:
    """In float32, where ``lse`` beside -1e4 has 3 digits after the point, and beside -1e9 none."""
    problem = Problem.random(*SIZES).to(torch.float32)
    mask = torch.zeros(1, 1, *SIZES)
    mask[..., 2, :] = low
    out, grads = blockwise(problem, [4], mask)
    dtype = torch.float64 if low > -5e8 else torch.float32  # -1e9 absorbs the scores of float32
    expected_out, expected_grads = expected(problem.to(dtype), mask.to(dtype))
    for found, wanted in zip([out, *grads], [expected_out, *expected_grads], strict=True):
        torch.testing.assert_close(found.double(), wanted.double(), atol=1e-5, rtol=1e-5)


def test_merge_of_nothing() -> None:
    """Rows that have seen nothing stay so; -inf beside -inf is no NaN."""
    out, lse = torch.zeros(1, 1, 2, 3), torch.full((1, 1, 2), -math.inf, dtype=torch.float64)
    block_lse = torch.tensor([[[-math.inf, 1.0]]], dtype=torch.float64)
    merge_block_(out, lse, torch.ones(1, 1, 2, 3), block_lse, 0, False)
    assert out.tolist() == [[[[0.0] * 3, [1.0] * 3]]]
    assert torch.equal(lse, block_lse)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (Case("cpu", torch.float64, 8, 8, True, False), "CPU flash"),
        (Case("cpu", torch.bfloat16, 80, 80, False, False), "CPU flash"),
        (Case("cpu", torch.float32, 8, 4, False, False), "PyTorch reference"),
        (Case("cpu", torch.float32, 8, 8, False, True), "PyTorch reference"),
        (Case("cpu", torch.float32, 8, 8, False, False, softcap=True), "PyTorch reference"),
        (Case("cuda", torch.bfloat16, 64, 64, False, False), "cuDNN"),
        (Case("cuda", torch.bfloat16, 64, 64, False, False, one_key=True), "CUDA flash"),
        (Case("cuda", torch.bfloat16, 64, 64, False, False, varying=True), "CUDA flash"),
        (Case("cuda", torch.bfloat16, 256, 256, False, False), "CUDA flash"),
        (Case("cuda", torch.bfloat16, 192, 128, False, False), "cuDNN"),
        (Case("cuda", torch.bfloat16, 64, 64, True, False), "CUDA memory-efficient"),
        (Case("cuda", torch.float32, 64, 64, False, False), "CUDA memory-efficient"),
        (Case("cuda", torch.float64, 64, 64, False, False), "PyTorch reference"),
        (Case("cuda", torch.bfloat16, 12, 12, False, False), "PyTorch reference"),
        (Case("cuda", torch.bfloat16, 64, 64, False, True), "PyTorch reference"),
        (Case("cuda", torch.bfloat16, 64, 64, False, False, softcap=True), "PyTorch reference"),
        (Case("cuda", torch.float32, 64, 64, True, False, softcap=True), "PyTorch reference"),
        (Case("cuda", torch.bfloat16, 192, 128, False, False, softcap=True), "PyTorch reference"),
        (Case("cpu", torch.float32, 8, 8, False, False, windowed=True), "PyTorch reference"),
        (Case("cuda", torch.bfloat16, 64, 64, False, False, windowed=True), "CUDA flash"),
        (Case("cuda", torch.bfloat16, 192, 128, False, False, windowed=True), "PyTorch reference"),
        (Case("cuda", torch.float32, 64, 64, False, False, windowed=True), "PyTorch reference"),
    ],
    ids=str,
)
def test_choice(case: Case, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "has_flash_attn", lambda: False)
    monkeypatch.setattr(cuda, "_capability", lambda: (9, 0))
    monkeypatch.setattr(cuda, "_prefers_cudnn", lambda: True)
    assert choose(case).name == name


def test_what_the_user_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's switches of its kernels, and of algorithms that repeat to the bit."""
    monkeypatch.setattr(cuda, "has_flash_attn", lambda: False)
    monkeypatch.setattr(cuda, "_capability", lambda: (9, 0))
    monkeypatch.setattr(cuda, "_prefers_cudnn", lambda: True)
    case = Case("cuda", torch.bfloat16, 64, 64, False, False)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert choose(case).name == "CUDA flash"
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        assert choose(case).name == "CUDA flash"
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        assert choose(case).name == "CUDA memory-efficient"
    with sdpa_kernel(SDPBackend.MATH):
        assert choose(case).name == OPEN.name


@pytest.mark.parametrize(
    ("capability", "sizes", "name"),
    [
        ((8, 0), (192, 128), "CUDA memory-efficient"),
        ((8, 9), (208, 208), "CUDA memory-efficient"),
        ((12, 0), (208, 208), "CUDA memory-efficient"),
        ((8, 9), (256, 256), "CUDA flash"),
        ((10, 0), (192, 128), "cuDNN"),
        ((8, 0), (128, 64), "cuDNN"),
    ],
    ids=str,
)
def test_head_sizes_of_gpus(
    capability: tuple[int, int], sizes: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "has_flash_attn", lambda: False)
    monkeypatch.setattr(cuda, "_capability", lambda: capability)
    monkeypatch.setattr(cuda, "_prefers_cudnn", lambda: False)
    assert choose(Case("cuda", torch.bfloat16, *sizes, False, False)).name == name


def test_windows_and_pieces_beside_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has neither; the flash kernels, which have, are no worse than masks in tiles."""
    monkeypatch.setattr(cuda, "has_flash_attn", lambda: False)
    monkeypatch.setattr(cuda, "_capability", lambda: (9, 0))
    monkeypatch.setattr(cuda, "_prefers_cudnn", lambda: True)
    case = Case("cuda", torch.bfloat16, 64, 64, False, False)
    assert has_windows(case) and varlen_of(case) is not None
    assert not has_windows(replace(case, value_dim=32)) and varlen_of(replace(case, value_dim=32)) is None


def test_rows_as_gpu_kernels_need_them() -> None:
    """Of 16 bits and with heads of 16, rows begin at multiples of 16 bytes, or are copied."""
    whole = torch.randn(2, 3, 7, 48).to(torch.bfloat16)
    for x, is_kept in ((whole[..., 16:32], True), (whole[..., 4:20], False), (whole.mT[..., :2], False)):
        found = aligned_rows(x)
        assert (found.data_ptr() == x.data_ptr()) == is_kept
        assert torch.equal(found, x) and found.stride(-1) == 1 and found.storage_offset() % 8 == 0
        assert is_kept or found.is_contiguous()


def test_flash_attn_comes_first_where_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "has_flash_attn", lambda: True)
    monkeypatch.setattr(cuda, "_capability", lambda: (9, 0))
    monkeypatch.setattr(cuda, "_prefers_cudnn", lambda: False)
    assert choose(Case("cuda", torch.bfloat16, 64, 64, False, False)).name == "flash-attn"
    assert choose(Case("cuda", torch.bfloat16, 64, 64, False, False, softcap=True)).name == "flash-attn"
    monkeypatch.setattr(cuda, "_capability", lambda: (8, 0))
    assert choose(Case("cuda", torch.bfloat16, 64, 64, False, False)).name == "flash-attn"
    monkeypatch.setattr(cuda, "_capability", lambda: (7, 5))
    assert choose(Case("cuda", torch.bfloat16, 64, 64, False, False)).name == "CUDA memory-efficient"


@pytest.mark.parametrize(("causal", "softcap"), [(False, 0.0), (True, 0.0), (True, 0.7)])
def test_flash_attn_is_called_as_it_is_defined(
    causal: bool, softcap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in of it, which takes no tensor whose rows do not lie in one piece."""
    calls = flash_attn_on_cpu(monkeypatch)
    kernel = next(kernel for kernel in TABLE if kernel.name == "flash-attn")
    grad, query, key, value = (torch.randn(2, 4, 8, 6, dtype=torch.float64).mT for _ in range(4))
    extra = {"softcap": softcap} if softcap else {}
    expected = OPEN.forward(query, key, value, None, causal, 0.3, **extra)
    out, lse = kernel.forward(query, key, value, None, causal, 0.3, **extra)
    grads = kernel.backward(grad, query, key, value, None, out, lse.mT.contiguous().mT, causal, 0.3, **extra)
    true_grads = OPEN.backward(grad, query, key, value, None, *expected, causal, 0.3, **extra)
    for x, y in zip((out, lse, *grads), (*expected, *true_grads), strict=True):
        torch.testing.assert_close(x, y)
    assert {window for *_, window in calls} == {(-1, 0 if causal else -1)}


def test_kernel_name() -> None:
    query, value = torch.empty(1, 2, 3, 8), torch.empty(1, 2, 3, 8)
    assert kernel_name(query, value, masked=True) == "CPU flash"
    assert kernel_name(query, value, softcap=0.5) == OPEN.name
    assert kernel_name(query, value, explicit=True) == OPEN.name == TABLE[-1].name


@pytest.mark.parametrize(
    ("name", "dtype", "value_dim", "masked"),
    [
        ("CUDA flash", torch.bfloat16, 16, False),
        ("cuDNN", torch.float16, 8, False),
        ("CUDA memory-efficient", torch.float32, 8, True),
        ("CUDA memory-efficient", torch.bfloat16, 16, True),
        ("CUDA memory-efficient", torch.float32, 8, False),
    ],
)
def test_shapes_of_cuda_kernels(name: str, dtype: torch.dtype, value_dim: int, masked: bool) -> None:
    """What they return has the interface's shapes; no GPU is needed to know."""
    kernel = next(kernel for kernel in TABLE if kernel.name == name)
    key_heads = 2 if kernel.grouped else 4
    with FakeTensorMode():
        query = torch.empty(2, 4, 6, 16, device="cuda", dtype=dtype)
        key = torch.empty(2, key_heads, 10, 16, device="cuda", dtype=dtype)
        value = torch.empty(2, key_heads, 10, value_dim, device="cuda", dtype=dtype)
        bias = torch.empty(1, 1, 6, 10, device="cuda") if masked else None
        out, lse = kernel.forward(query, key, value, bias, False, 0.5)
        grads = kernel.backward(torch.empty_like(out), query, key, value, bias, out, lse, False, 0.5)
        if name == "CUDA flash":
            window = kernel.forward(query, key, value, None, True, 0.5, sliding=True)
            assert [x.shape for x in window] == [out.shape, lse.shape]
            found = kernel.backward(torch.empty_like(out), query, key, value, None, out, lse, True, 0.5, sliding=True)
            assert [x.shape for x in found] == [x.shape for x in grads]
    assert out.shape == (2, 4, 6, value_dim)
    assert (lse.shape, lse.dtype) == ((2, 4, 6), torch.float32)
    assert [x.shape for x in grads] == [query.shape, key.shape, value.shape]
