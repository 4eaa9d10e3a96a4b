"""Blocks and gradients of 16 bits are summed as they are; on GPUs a merge is one compiled kernel.

No GPU is needed: kernels that keep 16 bits are stand-ins (`tests/support/cuda_stand_ins.py`), and Inductor compiles for
the CPU what it compiles for a GPU.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.testing import CompileCounter
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

from sptransform.ops.ring import blocks, fused, sums
from sptransform.sharding.partition import Partition
from tests.ops.ring.ranks import Problem, Ring, one_device, visible
from tests.support.cuda_stand_ins import pretend_cuda, torch_flash_on_cpu

sp = torch.ops.sptransform


def rows(batch: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[batch, 4, size, 16] in the memory layout of block results."""
    return torch.randn(batch, size, 4, 16).to(dtype).transpose(1, 2)


def problem(dtype: torch.dtype = torch.bfloat16) -> Problem:
    return Problem.random(32, dim=8, dtype=dtype)


@pytest.mark.parametrize(("key_heads", "key_head_of"), [(2, []), (4, []), (2, [1, 0, 0, 1])])
@pytest.mark.parametrize("causal", [True, False])
def test_kernels_keep_16_bits(
    key_heads: int, key_head_of: list[int], causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fakes say so too. Sums over heads that the kernel cannot take are float32."""
    pretend_cuda(monkeypatch)
    grad, *xs = (torch.randn(2, heads, 8, 8).bfloat16() for heads in (4, 4, key_heads, key_heads))
    options: dict[str, Any] = {"key_head_of": key_head_of}
    with torch_flash_on_cpu():
        out, lse = sp.attention_block(*xs, None, causal, **options)
        grads = sp.attention_block_backward(grad, *xs, None, out, lse, causal, **options)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(sp.attention_block.default, (*xs, None, causal), options, test_utils=checks)
        arguments = (grad, *xs, None, out, lse, causal)
        torch.library.opcheck(sp.attention_block_backward.default, arguments, options, test_utils=checks)
    of_keys = torch.float32 if key_head_of else torch.bfloat16
    assert [x.dtype for x in (out, lse, *grads)] == [torch.bfloat16, torch.float64, torch.bfloat16, of_keys, of_keys]


class Converted(TorchDispatchMode):
    """The number of entries that are converted from 16 bits to float32."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and (args[0].dtype, out.dtype) == (torch.bfloat16, torch.float32):
            self.num += out.numel()
        return out


@pytest.mark.parametrize("farthest", [None, 9])
def test_rings_sum_in_float32(farthest: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is added is not; errors are those of the kernels' own rounding, forward and backward, as on one device."""
    pretend_cuda(monkeypatch)
    dtypes = set()

    def watched(fn: Any, added: int) -> Any:
        def run(*args: Any) -> Any:
            dtypes.add((args[0].dtype, args[added].dtype))
            return fn(*args)

        return run

    for name, added in (("merge_block_", 2), ("add_block_", 1), ("add_to_message_", 1)):
        monkeypatch.setattr(sums, name, watched(getattr(sums, name), added))
    partition, shown = Partition.zigzag(32, 4), visible(32, 32, 0, farthest)
    with torch_flash_on_cpu():
        found = Ring(partition, partition, options={"nearest": 0, "farthest": farthest}).run(problem())
    # the gradients that come back in a message are a sum already
    assert dtypes == {(torch.float32, torch.bfloat16), (torch.float32, torch.float32)}
    exact = one_device(problem().to(torch.float64), shown)
    for x, y in zip((found[0], *found[1]), (exact[0], *exact[1]), strict=True):
        assert x.dtype == torch.bfloat16
        assert (x.double() - y).square().mean().sqrt() < 2**-8 * y.square().mean().sqrt()


def test_gradients_are_added_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four blocks the first is converted, to become the sum; the others are read as 16 bits."""
    pretend_cuda(monkeypatch)
    total = torch.randn(1, 4, 8, 16)
    block = torch.randn(1, 4, 6, 16).bfloat16()
    with Converted() as converted:
        found = sp.add_block(total, block, 2)
        message = sp.add_to_message(torch.zeros(2 * 4 * 8 * 16), block, block, 1)
    assert converted.num == 0
    torch.testing.assert_close(found[:, :, 2:], total[:, :, 2:] + block.float(), atol=0, rtol=0)
    assert message.dtype == torch.float32 and message.count_nonzero() == 2 * block.count_nonzero()


@pytest.mark.parametrize("start", [0, 5])
def test_16_bits_are_merged_as_their_float32(start: int) -> None:
    out, block = rows(2, 12), rows(2, 7, torch.bfloat16)
    lse, block_lse = torch.randn(2, 4, 12, dtype=torch.float64), torch.randn(2, 4, 7, dtype=torch.float64)
    found = sp.merge_block(out, lse, block, block_lse, start, False)
    expected = sp.merge_block(out, lse, block.float(), block_lse, start, False)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, atol=0, rtol=0)


def compiled_merges(monkeypatch: pytest.MonkeyPatch, compile_with: Any) -> None:
    """Merges of blocks of many sizes, compiled, against those that are not."""
    for batch, size in [(1, 8), (1, 16), (1, 12), (2, 8), (2, 16), (3, 10)]:
        for start, length, may_sink in [(0, size, False), (0, size // 2, False), (size // 2, size // 2, True)]:
            out, block = rows(batch, size), rows(batch, length, torch.bfloat16)
            lse = torch.randn(batch, 4, size, dtype=torch.float64)
            lse[:, 0] = -torch.inf
            block_lse = torch.randn(batch, 4, length, dtype=torch.float64)
            block_lse[:, :, 0] = -torch.inf
            arguments = block, block_lse, start, may_sink
            expected = sp.merge_block(out, lse, *arguments)
            with monkeypatch.context() as patched:
                patched.setattr(fused, "DEVICES", {"cpu"})
                patched.setattr(torch, "compile", compile_with)
                found = sp.merge_block(out, lse, *arguments)
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-6)


@pytest.fixture
def new_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two functions of a merge, not compiled yet."""
    torch._dynamo.reset()
    for name in ("_weigh", "_lerp_"):
        monkeypatch.setattr(blocks, name, fused.fused(getattr(blocks, name).__wrapped__))


@pytest.mark.usefixtures("new_functions")
def test_a_merge_is_compiled_for_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice each: for the first rows and others, since Dynamo tells an offset of 0; for masks that may sink or not."""
    counter, compile_function = CompileCounter(), torch.compile
    compiled_merges(monkeypatch, lambda fn, dynamic: compile_function(fn, dynamic=dynamic, backend=counter))
    assert counter.frame_count <= 4


@pytest.mark.usefixtures("new_functions")
def test_without_a_compiler_a_merge_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(fn: Any, dynamic: bool) -> Any:
        def run(*args: Any) -> Any:
            raise TorchDynamoException("no compiler")

        return run

    with caplog.at_level(logging.WARNING):
        compiled_merges(monkeypatch, missing)
    assert [record.args[0] for record in caplog.records] == ["weigh", "_lerp_"]


@pytest.mark.inductor
@pytest.mark.slow
@pytest.mark.usefixtures("new_functions")
def test_inductor_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_merges(monkeypatch, torch.compile)


@pytest.mark.inductor
@pytest.mark.slow
@pytest.mark.usefixtures("new_functions")
@pytest.mark.parametrize(("batch", "start"), [(1, 0), (2, 0), (1, 24), (2, 24)])
def test_a_merge_moves_10_bytes_an_entry(batch: int, start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel reads the block (2 bytes) and the result (4), and writes the result (4); nothing else is as large."""
    monkeypatch.setattr(fused, "DEVICES", {"cpu"})
    out, block = rows(batch, start + 24), rows(batch, 24, torch.bfloat16)
    lse, block_lse = torch.randn(batch, 4, start + 24).double(), torch.randn(batch, 4, 24).double()
    _, codes = run_and_get_code(sp.merge_block, out, lse, block, block_lse, start, False)
    (code,) = (code for code in codes if "BFloat16" in code)
    assert "= empty_strided" not in code
    (kernel,) = re.findall(r"async_compile\.cpp_pybinding\(\[(.*?)\]", code)
    pointers = [kind for kind in re.findall(r"'(.*?)'", kernel) if "*" in kind]
    assert sorted(pointers) == ["const at::BFloat16*", "const float*", "const float*", "float*"]
    assert code.count("store(") == 2  # of full vectors, and of what is left
