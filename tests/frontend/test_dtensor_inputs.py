"""Inputs that ranks share, as DTensors: read as they are, with gradients shared likewise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

import sptransform
from sptransform import UsageError
from tests.support.collective_counts import CountCollectives
from tests.support.equality import Result, assert_equal_to_one_device, one_device, run_one_device
from tests.support.gloo_pool import get_pool
from tests.support.models import HIDDEN, MODELS, CausalBlock, build
from tests.support.tiers import tiered

pytestmark = pytest.mark.timeout(180)


class Feed(nn.Module):
    """No attention: only the input says what the sequence is."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x)).relu()


def a_model(kind: type[nn.Module], length: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return kind().double(), torch.randn(2, length, HIDDEN, dtype=torch.float64)


def shared(
    rank: int, world_size: int, kind: type[nn.Module], strategy: str, placement: Placement, lengths: tuple[int, ...]
) -> list[tuple[Tensor, Tensor, list[Tensor], list[str], set[str]]]:
    """For each length: output, gradients of the input and the parameters, how each was shared, and what was sent."""
    mesh = init_device_mesh("cpu", (world_size,))
    model = sptransform.parallelize(a_model(kind, 1)[0], strategy, backend="aot_eager")
    found = []
    for length in lengths:
        x = distribute_tensor(a_model(kind, length)[1], mesh, [placement]).requires_grad_()
        model.zero_grad()
        with CountCollectives() as counted:
            out = model(x)
            out.sin().sum().backward()
        grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
        how = [str(y.placements[0]) for y in (out, x.grad)]
        kinds = {collective.name for collective in counted.collectives}
        found.append((out.detach().full_tensor(), x.grad.full_tensor(), grads, how, kinds))
    return found


@pytest.mark.parametrize(
    ("kind", "strategy", "placement", "lengths"),
    tiered(
        [
            (CausalBlock, "ulysses", Shard(1), (8, 12, 7)),
            (CausalBlock, "ring", Shard(1), (8, 7)),
            (CausalBlock, "megatron", Shard(1), (8,)),
            (CausalBlock, "ulysses", Shard(0), (8,)),
            (CausalBlock, "ulysses", Replicate(), (8,)),
            (Feed, "ulysses", Shard(1), (8,)),
        ],
        quick=[(CausalBlock, "ring", Shard(1), (8, 7)), (Feed, "ulysses", Shard(1), (8,))],
    ),
    ids=str,
)
def test_equals_one_device(
    kind: type[nn.Module], strategy: str, placement: Placement, lengths: tuple[int, ...]
) -> None:
    expected = []
    for length in lengths:
        model, x = a_model(kind, length)
        out = model(x.requires_grad_())
        out.sin().sum().backward()
        expected.append((out.detach(), x.grad, [p.grad for p in model.parameters()]))
    for results in get_pool(2).run(shared, kind, strategy, placement, lengths, timeout=150):
        for (out, x_grad, grads, how, kinds), (true_out, true_x_grad, true_grads) in zip(
            results, expected, strict=True
        ):
            for got, true in zip([out, x_grad, *grads], [true_out, true_x_grad, *true_grads], strict=True):
                torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-12)
            if out.shape[1] % 2 == 0:  # torch 2.11 gathers the gradients of uneven parts
                assert how == ["S(1)", str(placement)]
            if strategy != "megatron" and placement == Shard(1):
                assert "all_gather_into_tensor" not in kinds


def whole_model(rank: int, world_size: int, name: str) -> Result:
    """Tokens and labels come in parts, as a data loader of each rank could read them."""
    mesh = init_device_mesh("cpu", (world_size,))
    model, inputs = build(name, layers=1)
    parts = {name: distribute_tensor(x, mesh, [Shard(1)]) for name, x in inputs.items()}
    sptransform.parallelize(model, "ulysses", backend="aot_eager")
    return run_one_device(model, parts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdpa_transformer", "bert"])
def test_tokens_and_labels_in_parts(name: str) -> None:
    for result in get_pool(2).run(whole_model, name, timeout=150):
        assert_equal_to_one_device(one_device(name, layers=1), result, MODELS[name].tolerance)


def many(rank: int, world_size: int) -> float:
    """More modules than Dynamo keeps graphs of one function for, each given what the one before it returns."""
    torch.manual_seed(0)
    x = distribute_tensor(torch.randn(2, 8, HIDDEN, dtype=torch.float64), init_device_mesh("cpu", (2,)), [Shard(1)])
    blocks = [Feed().double() for _ in range(10)]
    expected = nn.Sequential(*blocks)(x.full_tensor())
    for block in blocks:
        x = sptransform.parallelize(block, "ulysses", backend="eager")(x)
    return float((x.full_tensor() - expected).abs().max())


@pytest.mark.slow
def test_many_modules() -> None:
    assert max(get_pool(2).run(many, timeout=150)) < 1e-12


def alone(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    model, x = a_model(CausalBlock, 8)
    mesh = init_device_mesh("cpu", (1,))
    expected = model(x)
    sptransform.parallelize(model, "ulysses", mesh=mesh, backend="aot_eager")
    return expected.detach(), model(distribute_tensor(x, mesh, [Shard(1)])).detach()


def test_one_rank() -> None:
    ((expected, got),) = get_pool(1).run(alone, timeout=60)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def across(rank: int, world_size: int, strategy: object) -> tuple[list[str], Tensor, Tensor]:
    """Two blocks over a mesh of two dims, the second given what the first returns."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    torch.manual_seed(0)
    blocks = [CausalBlock().double() for _ in range(2)]
    x = torch.randn(2, 16, HIDDEN, dtype=torch.float64)
    for block in blocks:
        sptransform.parallelize(block, strategy, mesh=mesh, backend="aot_eager")
    hidden = blocks[0](x)
    out = blocks[1](hidden)
    out.sin().sum().backward()
    grad = blocks[0].qkv.weight.grad
    whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return [str(placement) for placement in hidden.placements], out.detach().full_tensor(), whole


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["usp", ("ring", "megatron")], ids=str)
def test_over_two_mesh_dims(strategy: object) -> None:
    torch.manual_seed(0)
    blocks = [CausalBlock().double() for _ in range(2)]
    out = blocks[1](blocks[0](torch.randn(2, 16, HIDDEN, dtype=torch.float64)))
    out.sin().sum().backward()
    for how, got, grad in get_pool(4).run(across, strategy, timeout=150):
        assert how == ["S(1)", "S(1)"]
        torch.testing.assert_close(got, out.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad, blocks[0].qkv.weight.grad, rtol=1e-11, atol=1e-11)


def of_others(rank: int, world_size: int) -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("far", "near"))
    model, x = a_model(CausalBlock, 8)
    sptransform.parallelize(model, "ulysses", mesh=mesh["near"], backend="aot_eager")
    with pytest.raises(UsageError) as error:
        model(distribute_tensor(x, mesh["far"], [Shard(1)]))
    return str(error.value)


def test_what_others_share_is_refused() -> None:
    for text in get_pool(4).run(of_others, timeout=60):
        assert "shared by other ranks" in text and "Shard(1) over ranks [" in text


def refused(rank: int, world_size: int, what: str) -> str:
    mesh = init_device_mesh("cpu", (world_size,))
    model, x = a_model(CausalBlock, 8)
    sptransform.parallelize(model, "ulysses", backend="aot_eager")
    if what == "partial":
        given = DTensor.from_local(x, mesh, [Partial()], run_check=False)
    elif what == "other parts":
        part = x[:, :3] if rank == 0 else x[:, 3:]
        given = DTensor.from_local(part, mesh, [Shard(1)], run_check=False, shape=x.shape, stride=x.stride())
    else:
        given = DTensor.from_local(x, DeviceMesh("cpu", [1, 0]), [Shard(1)], run_check=False)
    with pytest.raises(UsageError) as error:
        model(given)
    return str(error.value)


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ("partial", "placed (Partial(sum),)"),
        ("another order", "over ranks [1, 0]"),
        ("other parts", f"a DTensor of shape (2, 8, {HIDDEN}), here (2, "),
    ],
)
def test_refused(what: str, found: str) -> None:
    for text in get_pool(2).run(refused, what, timeout=60):
        assert found in text
