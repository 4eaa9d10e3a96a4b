"""A training script's habits: evaluation between steps, accumulation, dropout; the same at every run and rank."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import sptransform
from tests.support.collective_counts import CountCollectives
from tests.support.equality import Result, assert_equal_to_one_device, run_one_device
from tests.support.gloo_pool import get_pool
from tests.support.models import FLOAT64, HEADS, HIDDEN, MODELS, CausalTransformer, Inputs, build
from tests.support.tiers import tiered

pytestmark = pytest.mark.timeout(240)


def parallel(model: nn.Module, **options: Any) -> nn.Module:
    return sptransform.parallelize(model, "ulysses", **{"backend": "aot_eager"} | options)


def grads_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- evaluation between steps ---------------------------------------------------------------------------------


def modes() -> list[tuple[bool, Callable[[], Any]]]:
    """Training, evaluation in three manners, and training again."""
    evaluations = [(False, torch.no_grad), (False, torch.inference_mode), (False, torch.enable_grad)]
    return [(True, torch.enable_grad), *evaluations, (True, torch.no_grad), (True, torch.enable_grad)]


def through_modes(model: nn.Module, inputs: Inputs) -> list[tuple[torch.Tensor, torch.Tensor, bool, bool]]:
    """In each mode: loss, whole logits, whether the loss wants gradients, whether ranks shared the work."""
    found = []
    for is_training, mode in modes():
        model.train(is_training)
        with CountCollectives() as counted, mode():
            out = model(**inputs)
        with mode():
            logits = out.logits.full_tensor() if isinstance(out.logits, DTensor) else out.logits
            found.append((out.loss.clone(), logits.clone(), out.loss.requires_grad, bool(counted.collectives)))
        if out.loss.requires_grad:
            model.zero_grad()
            out.loss.backward()
    return [(loss.detach(), logits.detach(), *rest) for loss, logits, *rest in found]


def switches(rank: int, world_size: int, outputs: str) -> tuple[list[Any], dict[str, torch.Tensor]]:
    model, inputs = build("llama", layers=1)
    found = through_modes(parallel(model, outputs=outputs), inputs)
    return [(loss.clone(), logits.clone(), *rest) for loss, logits, *rest in found], grads_of(model)


@pytest.mark.slow
@pytest.mark.parametrize("outputs", ["dtensor", "full"])
def test_evaluating_between_steps(outputs: str) -> None:
    model, inputs = build("llama", layers=1)
    expected, tolerance = through_modes(model, inputs), MODELS["llama"].tolerance
    for found, grads in get_pool(2).run(switches, outputs):
        for (loss, logits, wants, communicated), (loss_1, logits_1, wants_1, _) in zip(found, expected, strict=True):
            torch.testing.assert_close(loss, loss_1, rtol=tolerance, atol=0)
            torch.testing.assert_close(logits, logits_1, rtol=0, atol=1e-5)
            assert wants == wants_1
            assert communicated
        last = Result(expected[-1][0], grads_of(model))
        assert_equal_to_one_device(last, Result(found[-1][0], grads), tolerance)


# --- the same at every run ------------------------------------------------------------------------------------


def runs(rank: int, world_size: int, num_runs: int) -> list[Result]:
    model, inputs = build("llama", layers=1, dtype=torch.float32)
    parallel(model)
    results = []
    for _ in range(num_runs):
        model.zero_grad()
        results.append(run_one_device(model, inputs))
    return results


def assert_same(first: Result, other: Result) -> None:
    assert torch.equal(first.loss, other.loss)
    for name, grad in first.grads.items():
        assert torch.equal(grad, other.grads[name]), name


@pytest.mark.slow
def test_twenty_runs_are_the_same_to_the_bit_on_all_ranks() -> None:
    first, second = get_pool(2).run(runs, 20)
    assert len(first) == len(second) == 20
    for result in (*first, *second):
        assert_same(first[0], result)


# --- gradient accumulation ------------------------------------------------------------------------------------


def micro_batches() -> list[Inputs]:
    """Three, of different labels, so that their means weigh differently."""
    inputs = build("sdpa_transformer", batch=6)[1]
    return [{name: x[i : i + 2] for name, x in inputs.items()} for i in (0, 2, 4)]


def accumulate(model: nn.Module) -> Result:
    total = torch.zeros((), dtype=torch.float64)
    for inputs in micro_batches():
        loss = model(**inputs) / 3
        loss.backward()
        total += loss.detach()
    return Result(total, grads_of(model))


def accumulates(rank: int, world_size: int, grad_sync: bool) -> Result:
    model = parallel(build("sdpa_transformer", layers=1)[0], grad_sync=grad_sync)
    result = accumulate(model)
    if not grad_sync:
        for grad in result.grads.values():
            dist.all_reduce(grad)
    return result


@pytest.mark.parametrize("grad_sync", tiered([True, False], quick=[False]))
def test_accumulated_gradients_are_those_of_one_device(grad_sync: bool) -> None:
    reference = accumulate(build("sdpa_transformer", layers=1)[0])
    for result in get_pool(2).run(accumulates, grad_sync):
        assert_equal_to_one_device(reference, result, FLOAT64)


# --- dropout --------------------------------------------------------------------------------------------------

RATE = 0.3


class Dropping(CausalTransformer):
    """Drops positions, tokens, attention probabilities and residuals."""

    is_checkpointed = False

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        positions = functional.dropout(self.positions(torch.arange(input_ids.shape[1])), RATE)
        x = functional.dropout(self.tokens(input_ids) + positions, RATE)
        for block in self.blocks:
            x = checkpoint(self.block, block, x, use_reentrant=False) if self.is_checkpointed else self.block(block, x)
        logits = self.head(self.norm(x))
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def block(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        batch, seq_len, _ = x.shape
        qkv = block.qkv(block.attention_norm(x)).view(batch, seq_len, 3, HEADS, HIDDEN // HEADS)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, dropout_p=RATE, is_causal=True)
        x = x + functional.dropout(block.projection(attended.transpose(1, 2).flatten(2)), RATE)
        return x + functional.dropout(block.mlp(block.mlp_norm(x)), RATE)


def dropping(is_checkpointed: bool) -> tuple[nn.Module, Inputs]:
    # of two layers that are recomputed the second one's masks are drawn again first
    model, inputs = build("sdpa_transformer", layers=2 if is_checkpointed else 1)
    model.__class__ = Dropping
    model.is_checkpointed = is_checkpointed
    return parallel(model), inputs


def steps_of_dropout(rank: int, world_size: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The losses of some steps, and the state of the default generator after them."""
    torch.manual_seed(3)
    model, inputs = dropping(False)
    losses = []
    for _ in range(4):
        loss = model(**inputs)
        loss.backward()
        losses.append(loss.detach())
    return losses, torch.get_rng_state()


def test_generators_stay_in_step_and_masks_change() -> None:
    (first, state), (second, other) = get_pool(2).run(steps_of_dropout)
    assert torch.equal(state, other)
    assert [float(loss) for loss in first] == [float(loss) for loss in second]
    assert len({float(loss) for loss in first}) == 4


def slope(rank: int, world_size: int, is_checkpointed: bool) -> tuple[float, float, bool]:
    """The derivative along a random direction by backward and by differences, and whether a seed gives one gradient."""
    model, inputs = dropping(is_checkpointed)

    def loss_at() -> torch.Tensor:
        torch.manual_seed(5)
        return model(**inputs)

    loss_at().backward()
    grads = grads_of(model)
    model.zero_grad()
    loss_at().backward()
    is_same = all(torch.equal(grad, grads[name]) for name, grad in grads_of(model).items())
    generator = torch.Generator().manual_seed(1)
    step = {name: torch.randn(g.shape, generator=generator, dtype=g.dtype) * 1e-4 for name, g in grads.items()}
    by_backward = float(sum((grads[name] * step[name]).sum() for name in grads))

    def moved(sign: int) -> float:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += sign * step[name]
        return float(loss_at().detach())

    ahead = moved(1)
    moved(-1)
    behind = moved(-1)
    return by_backward, (ahead - behind) / 2, is_same


@pytest.mark.parametrize("is_checkpointed", tiered([False, True], quick=[True]), ids=["kept", "recomputed"])
def test_the_backward_sees_the_masks_of_the_forward(is_checkpointed: bool) -> None:
    for by_backward, by_differences, is_same in get_pool(2).run(slope, is_checkpointed):
        assert abs(by_backward - by_differences) < 1e-5 * abs(by_differences)
        assert is_same


class TwoMasks(nn.Module):
    """What dropout leaves of ones: of a sharded tensor, and of one that every rank has whole."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        qkv = self.qkv(x).view(*x.shape[:2], 3, HEADS, HIDDEN // HEADS)
        attended = functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        ones = torch.ones_like(attended.transpose(1, 2).flatten(2)) + 0 * x
        return functional.dropout(ones, RATE), functional.dropout(table, RATE)


def masks(rank: int, world_size: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = parallel(TwoMasks().double(), outputs="local")
    x = torch.randn(4, 64, HIDDEN, dtype=torch.float64)
    return [part.detach() for part in model(x, torch.ones(512, dtype=torch.float64))]


def test_masks_differ_where_ranks_have_parts_and_agree_where_all_have_the_whole() -> None:
    (first, table), (second, other) = get_pool(2).run(masks)
    assert first.shape == second.shape == (4, 32, HIDDEN)
    for part in (first, second, table):
        assert set(part.unique().tolist()) == {0.0, 1 / (1 - RATE)}
        assert abs(float((part > 0).double().mean()) - (1 - RATE)) < 0.05
    agreement = float(((first == 0) == (second == 0)).double().mean())
    assert abs(agreement - (RATE**2 + (1 - RATE) ** 2)) < 0.03  # of independent masks
    assert torch.equal(table, other)
