"""The ops as ops: gradients by finite differences, fakes, compilers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

from tests.ops.ring.ranks import Problem, one_device, visible
from tests.support.tiers import INDUCTOR

sp = torch.ops.sptransform


def inputs(
    size: int = 6, *, batch: int = 2, dim: int = 4, requires_grad: bool = True, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    problem = Problem.random(size, batch=batch, heads=4, key_heads=2, dim=dim, dtype=dtype)
    return [x.requires_grad_(requires_grad) for x in (problem.query, problem.key, problem.value)]


OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"nearest": 0},
    "window": {"nearest": 0, "farthest": 2},
    "mask": {"mask": "%2 = eq.Tensor(%0, %1)", "scale": 0.4},
    "heads": {"key_head_of": [1, 0, 0, 1]},
    "softcap": {"nearest": 0, "softcap": 0.8},
}


def operands(name: str, size: int = 6) -> tuple[list[Tensor], list[Tensor]]:
    documents = torch.tensor([0, 0, 1, 1, 1, 2])[:size]
    return ([documents[:, None]], [documents[None]]) if name == "mask" else ([], [])


@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(name: str) -> None:
    rows, columns = operands(name, 4)
    xs = inputs(4, batch=1, dim=2)
    assert torch.autograd.gradcheck(lambda *xs: sp.ring_attention(*xs, rows, columns, **OPTIONS[name])[0], xs)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    rows, columns = operands(name)
    options = OPTIONS[name]
    tolerances = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    xs = inputs(dtype=dtype)
    torch.library.opcheck(sp.ring_attention.default, (*xs, rows, columns), options, **tolerances)
    xs = [x.detach() for x in xs]
    result = sp.ring_attention(*xs, rows, columns, **options)
    arguments = (torch.ones_like(result[0]), *xs, rows, columns, *result)
    torch.library.opcheck(sp.ring_attention_backward.default, arguments, options, **tolerances)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sinks_are_an_operand(dtype: torch.dtype) -> None:
    """Their gradient comes in their own dtype."""
    xs, sinks = inputs(4, batch=1, dim=2, dtype=dtype), torch.randn(4, dtype=torch.float64, requires_grad=True)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(
            lambda *xs: sp.ring_attention(*xs[:3], [], [], xs[3], nearest=0)[0], [*xs, sinks]
        )
    tolerances = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(sp.ring_attention.default, (*xs, [], [], sinks), {"nearest": 0}, **tolerances)
    out, *_ = sp.ring_attention(*xs, [], [], sinks=sinks)
    (grad,) = torch.autograd.grad(out.sum(), [sinks], retain_graph=True)
    assert grad.dtype == torch.float64 and grad.count_nonzero() == 4
    out, *_ = sp.ring_attention(*xs, [], [], sinks.detach())
    assert len(torch.autograd.grad(out.sum(), xs)) == 3


def test_opcheck_of_the_parts() -> None:
    query, key, value = (x.detach() for x in inputs())
    mask = visible(6, 6, 0, 3)
    out, lse = sp.attention_block(query, key, value, mask, False)
    grads = sp.attention_block_backward(out, query, key, value, mask, out, lse, False)
    message = sp.pack_block(key, value)
    cases = {
        "attention_block": [(query, key, value, mask, False), (query, key, value[..., :3], None, True)],
        "attention_block_backward": [(out, query, key, value, mask, out, lse, False)],
        "band_mask": [(query, [0, 2, 5, 9], [3, 8], 0, 4), (query, [0, 6], [3, 8], None, None)],
        "merge_block": [(out, lse, out[:, :, :3], lse[:, :, :3], 2, True)],
        "merge_sinks": [(out, lse, lse[0, :, 0])],
        "add_block": [(grads[0], grads[0][:, :, :2], 4)],
        "pack_block": [(key, value)],
        "add_to_message": [(message, grads[1][:, :, :3], grads[2][:, :, :3], 1)],
    }
    for name, calls in cases.items():
        for arguments in calls:
            torch.library.opcheck(getattr(sp, name).default, arguments)
    # its result is random, which the check of values cannot know
    torch.library.opcheck(sp.dropout_seed.default, (query,), test_utils=("test_schema", "test_autograd_registration"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", ["heads first", "heads inside"])
def test_fakes_are_laid_out_as_results(dtype: torch.dtype, layout: str) -> None:
    xs = inputs(requires_grad=False, dtype=dtype)
    if layout == "heads inside":
        xs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in xs]
    results = sp.ring_attention(*xs, [], [], nearest=0)
    grads = sp.ring_attention_backward(results[0], *xs, [], [], *results, nearest=0)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in xs]
        fake_results = sp.ring_attention(*fakes, [], [], nearest=0)
        fake_grads = sp.ring_attention_backward(fake_results[0], *fakes, [], [], *fake_results, nearest=0)
    for x, fake in zip((*results, *grads), (*fake_results, *fake_grads), strict=True):
        assert (x.shape, x.stride(), x.dtype) == (fake.shape, fake.stride(), fake.dtype)


def _model(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out, *_ = sp.ring_attention(query * 2, key, value, [], [], nearest=0)
    return out.transpose(1, 2).flatten(2).square().sum(-1)


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_compiled(backend: str) -> None:
    xs = inputs(dtype=torch.float32)
    expected = torch.autograd.grad(_model(*xs).sum(), xs)
    torch._dynamo.reset()
    compiled = torch.compile(_model, backend=backend, fullgraph=True)
    for x, y in zip(torch.autograd.grad(compiled(*xs).sum(), xs), expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def test_the_partitioner_does_not_recompute_it() -> None:
    """It communicates: once forward, and the backward is another op. That it saves is listed in the interface."""
    graphs: dict[str, torch.fx.GraphModule] = {}

    def keep(name: str) -> Any:
        def compiler(gm: torch.fx.GraphModule, example: Any) -> Any:
            graphs[name] = gm
            return make_boxed_func(gm.forward)

        return compiler

    xs = inputs(dtype=torch.float32)
    compiled = aot_function(
        _model, keep("forward"), keep("backward"), partition_fn=min_cut_rematerialization_partition
    )  # fmt: skip
    torch.autograd.grad(compiled(*xs).sum(), xs)
    names = {
        name: [node.target for node in gm.graph.nodes if getattr(node.target, "namespace", "") == "sptransform"]
        for name, gm in graphs.items()
    }
    assert names == {
        "forward": [sp.ring_attention.default],
        "backward": [sp.ring_attention_backward.default],
    }


def test_the_lse_has_no_gradient_and_says_so() -> None:
    xs = inputs()
    out, lse, seed = sp.ring_attention(*xs, [], [], nearest=0)
    assert out.requires_grad and not lse.requires_grad and not seed.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        lse.sum().backward()


def test_an_op_of_a_mask_that_passes_no_gradient_is_refused() -> None:
    bias = torch.zeros(6, 6, dtype=torch.float64, requires_grad=True)
    out, *_ = sp.ring_attention(*inputs(), [bias], [], mask="%1 = erf(%0)")
    with pytest.raises(NotImplementedError, match=r"aten.erf.default passes no gradient to the operands of a mask"):
        out.sum().backward()


def test_one_rank_is_one_device() -> None:
    problem = Problem.random(9)
    xs = [x.requires_grad_() for x in (problem.query, problem.key, problem.value)]
    out, *_ = sp.ring_attention(*xs, [], [], nearest=0)
    expected, grads = one_device(problem, visible(9, 9, 0, None))
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    for x, y in zip(torch.autograd.grad(out, xs, problem.grad), grads, strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-12)
