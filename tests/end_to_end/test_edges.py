"""Programs at the edges of what a graph can say: exact, or refused by name. Never silently something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import sptransform
from sptransform.diagnostics.errors import CaptureError, UnsupportedOpError, UsageError
from tests.support.equality import assert_equal_to_one_device, run_one_device
from tests.support.gloo_pool import get_pool
from tests.support.graphs import assert_ranks_equal_one_device, on_ranks
from tests.support.rewritten import Asked, on_pretended_ranks

pytestmark = pytest.mark.timeout(200)

BATCH, LENGTH, HEADS, HIDDEN = 2, 12, 4, 8


def attend(x: Tensor) -> Tensor:
    heads = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    return functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(BATCH, LENGTH, HIDDEN, dtype=dtype, requires_grad=True)


class Reversed(torch.autograd.Function):
    """Its backward is not that of its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -0.5 * grad


class InPlace(torch.autograd.Function):
    """Its result is its input, written."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        x.mul_(2)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def under_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        slopes = torch.func.vmap(torch.func.grad(lambda row: row.tanh().sum()))(attend(x))
    return (attend(x) * slopes).sum(1)


def of_a_detached_tensor(x: Tensor) -> Tensor:
    return attend(x) + torch.func.grad(lambda y: y.tanh().pow(2).sum())(x.detach())


def partly_without_gradients(x: Tensor) -> Tensor:
    def row(y: Tensor) -> Tensor:
        with torch.no_grad():
            scale = y.sin()
        return y * scale

    return torch.vmap(row)(attend(x)).sum()


def by_a_pullback(x: Tensor) -> Tensor:
    """It is called where its transform has ended."""
    with torch.no_grad():
        _, pullback = torch.func.vjp(torch.sin, x)
        (slopes,) = pullback(x)
    return (attend(x) * slopes).sum()


def hooked(x: Tensor) -> Tensor:
    y = attend(x)
    y.register_hook(lambda grad: grad * 3)
    return y.sum()


@pytest.mark.parametrize(
    "program",
    [
        lambda x: torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y * 3, (attend(x),)).sum(),
        lambda x: torch.func.vmap(torch.func.grad(lambda row: row.tanh().sum()))(attend(x)).sum(),
        lambda x: InPlace.apply(attend(x) * 2).sum(),
        partly_without_gradients,
        by_a_pullback,
        pytest.param(hooked, marks=pytest.mark.skipif(torch.__version__ < "2.12", reason="its graph has the hook")),
    ],
    ids=["cond", "gradient of a gradient", "mark_dirty", "no_grad in vmap", "vjp", "hook"],
)
def test_what_would_be_lost_is_refused(program: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(CaptureError, match=r"fix: "):
        _rewrite(program)


@pytest.mark.skipif(torch.__version__ >= "2.12", reason="refused, see above")
def test_a_hook_that_the_graph_has_is_exact() -> None:
    reference, ranks, _ = on_ranks(hooked, inputs(), num_ranks=2, outputs="full")
    assert_ranks_equal_one_device(reference, ranks)


def _rewrite(program: Callable[[Tensor], Tensor], **options: Any) -> sptransform.Rewritten:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return program(x)

    return sptransform.rewrite(Model(), "ulysses", (inputs(),), world_size=2, **options)


@pytest.mark.covering(ways=1)
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize(
    "program",
    [
        lambda x: attend(x)[:, ::2].sum(1),
        lambda x: functional.pad(attend(x)[:, :0], (0, 0, 4, 0), value=2.0),
        lambda x: functional.pad(attend(x)[:, :-LENGTH], (0, 0, LENGTH, 0), value=1.0) + attend(x),
        lambda x: attend(x).sum(1).sum(dtype=torch.float32),
        lambda x: attend(x).mean(1, dtype=torch.float64).pow(2),
        lambda x: torch.where(attend(x).sum(1) > 0, attend(x).sum(1), x.mean(1)),
        lambda x: Reversed.apply(attend(x)).sum(1),
        lambda x: torch.vmap(lambda row: row * row.mean(-1, keepdim=True))(attend(x)).sum(1),
        lambda x: torch.vmap(torch.vmap(torch.outer, (0, None)), (1, 0), 1)(attend(x), x[0]).sum(1),
        under_no_grad,
        lambda x: functional.conv1d(attend(x).mT, torch.ones(1, HIDDEN, 2, dtype=x.dtype) / 3, stride=3),
        of_a_detached_tensor,
    ],
    ids=[
        "every other",
        "pad nothing",
        "pad what was cut off",
        "sum narrower",
        "mean",
        "where",
        "autograd.Function",
        "vmap",
        "vmaps",
        "gradient without gradients",
        "rows that no window reaches",
        "gradient of a detached tensor",
    ],
)
def test_programs_equal_one_device(program: Callable[[Tensor], Tensor], num_ranks: int) -> None:
    reference, ranks, _ = on_ranks(program, inputs(), num_ranks=num_ranks, outputs="full")
    assert_ranks_equal_one_device(reference, ranks)


@pytest.mark.parametrize(
    "program",
    [
        lambda x: (attend(x) * 0 + 1000).mean(),
        lambda x: functional.mse_loss(attend(x) * 0 + 100, x * 0),
    ],
    ids=["mean", "mse_loss"],
)
def test_means_of_16_bits_do_not_overflow(program: Callable[[Tensor], Tensor]) -> None:
    reference, ranks, _ = on_ranks(program, inputs(torch.float16), num_ranks=2)
    assert reference.outputs[0].isfinite()
    for run in ranks:
        torch.testing.assert_close(run.outputs, reference.outputs, rtol=1e-3, atol=0)


def test_masked_rows_under_attention_dropout_give_zeros() -> None:
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask[:3] = False

    def program(x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return functional.scaled_dot_product_attention(heads, heads, heads, mask, dropout_p=0.3)[:, :, :3]

    _, ranks, _ = on_ranks(program, inputs(), num_ranks=2, outputs="full")
    for run in ranks:
        assert not run.outputs[0].any() and run.grads[0].isfinite().all()


def test_strict_refuses_trainable_work_without_a_rule_wherever_it_stands() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.ConvTranspose1d(HIDDEN, HIDDEN, 3, padding=1).double()

        def forward(self, x: Tensor) -> Tensor:
            return attend(self.mix(x.transpose(1, 2)).transpose(1, 2)).sum()

    with pytest.raises(UnsupportedOpError, match="conv_transpose1d"):
        sptransform.rewrite(Model(), "ulysses", (inputs(),), world_size=2, strict=True)
    (fallback,) = sptransform.rewrite(Model(), "ulysses", (inputs(),), world_size=2).context.result.fallbacks
    assert "conv_transpose1d" in fallback.op


class LooksBothWays(nn.Module):
    """Of two ranks each reads one row of the other, so that shares are equal; what they pad is not."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1).double()

    def forward(self, x: Tensor) -> Tensor:
        return attend(self.mix(x.transpose(1, 2)).transpose(1, 2)).sum()


def test_equal_shares_need_not_be_equal_graphs() -> None:
    torch.manual_seed(0)
    model, asked = LooksBothWays(), Asked(2, "ulysses")
    ranks = on_pretended_ranks(model, {"x": inputs()}, [asked])[asked]
    assert len({id(graph) for graph in ranks.graphs}) == 2
    reference = run_one_device(model, {"x": inputs()})
    for result in ranks.results():
        assert_equal_to_one_device(reference, result, 1e-12)


class Scaled(nn.Module):
    """Takes a number, and lengths that cannot be cut in four."""

    def forward(self, x: Tensor, n: float) -> Tensor:
        quarters = attend(x).reshape(BATCH, x.shape[1] // 4, 4, HIDDEN)
        return quarters.pow(2).sum() / n


def run_numbers(rank: int, world_size: int, numbers: list[float], lengths: list[int]) -> list[tuple[float, Tensor]]:
    model = sptransform.parallelize(Scaled(), "ulysses", backend="aot_eager")
    return [_step(model, number, length) for number, length in zip(numbers, lengths, strict=True)]


def _step(model: nn.Module, number: float, length: int) -> tuple[float, Tensor]:
    torch.manual_seed(length)
    x = torch.randn(BATCH, length, HIDDEN, dtype=torch.float64, requires_grad=True)
    loss = model(x, number)
    loss.backward()
    return loss.item(), x.grad


@pytest.mark.parametrize(
    ("numbers", "lengths"),
    [
        (list(range(13, 25)), [12] * 12),  # more numbers than Dynamo allows compiles
        ([0.5, 0.25, 0.125], [12] * 3),
        ([2] * 4, [12, 24, 32, 48]),
    ],
    ids=["ints", "floats", "rounded lengths"],
)
def test_numbers_and_lengths_that_change(numbers: list[float], lengths: list[int]) -> None:
    expected = [_step(Scaled(), number, length) for number, length in zip(numbers, lengths, strict=True)]
    for found in get_pool(2).run(run_numbers, numbers, lengths, timeout=120):
        for (loss, grad), (reference, whole) in zip(found, expected, strict=True):
            assert loss == pytest.approx(reference, rel=1e-12)
            torch.testing.assert_close(grad, whole, rtol=1e-12, atol=1e-14)


def run_numbers_that_change(rank: int, world_size: int) -> str:
    model = sptransform.parallelize(Scaled(), "ulysses", backend="aot_eager")
    with pytest.raises(UsageError) as caught, torch._dynamo.config.patch(recompile_limit=2):
        for number in (0.5, 0.25, 0.125, 1.5):
            _step(model, number, 12)
    return str(caught.value)


def test_the_recompile_limit_is_an_error_with_a_fix() -> None:
    for message in get_pool(2).run(run_numbers_that_change, timeout=120):
        assert "pass numbers that change as tensors" in message


def run_after_the_limit(rank: int, world_size: int) -> list[bool]:
    """Whether each of these calls ran: over the limit thrice, then under a higher one; after resets of Dynamo."""
    model = sptransform.parallelize(Scaled(), "ulysses", backend="eager")

    def runs(number: float, limit: int) -> bool:
        with torch._dynamo.config.patch(recompile_limit=limit):
            try:
                _step(model, number, 12)
            except UsageError:
                return False
        return True

    found = [runs(number, 2) for number in (0.5, 0.25, 0.125, 1.5, 2.5)] + [runs(0.125, 3)]
    for _ in range(4):
        torch._dynamo.reset()
        found.append(runs(0.5, 2))
    return found


def test_graphs_that_were_refused_or_forgotten_do_not_count() -> None:
    for found in get_pool(2).run(run_after_the_limit, timeout=120):
        assert found == [True] * 2 + [False] * 3 + [True] * 5
