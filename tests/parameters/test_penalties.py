"""Parameters of which ranks keep parts, read behind the call: penalties in losses, norms of weights and gradients."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import sptransform
from tests.support.collective_counts import CountCollectives
from tests.support.gloo_pool import get_pool
from tests.support.tiers import tiered
from tests.support.tiny import Attention, token_inputs

pytestmark = pytest.mark.timeout(240)

EXACT = 1e-12
NUM = 29  # of this many classes two ranks have no equal share


class Model(Attention):
    """Remembers where its parameters began."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, NUM)
        self.began: list[Tensor] = []


def model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def tokens() -> Tensor:
    return token_inputs()["tokens"]


def of_gradients(m: Model) -> float:
    """Numbers of gradients, as they are logged."""
    m(tokens()).square().mean().backward()
    found = sum(x.grad.norm().item() + float(x.grad.mean()) for x in m.parameters())
    m.zero_grad()
    return found


def of_hooks(m: Model) -> float:
    found: list[float] = []
    hooks = [x.register_hook(lambda grad: found.append(grad.norm().item())) for x in m.parameters()]
    m(tokens()).square().mean().backward()
    m.zero_grad()
    for hook in hooks:
        hook.remove()
    return sum(found)


def of_autograd(m: Model) -> float:
    return sum(x.norm().item() for x in torch.autograd.grad(m(tokens()).square().mean(), list(m.parameters())))


def without_gradients(m: Model) -> float:
    with torch.no_grad():
        weight = m.tokens.weight
        numbers = m.head.weight.norm(), m.head.bias.mean(), weight.std(), weight.max(), weight.var(0)[0], weight.sum()
        return sum(x.item() for x in numbers) + sum(sum(x.tolist()[0]) for x in m.parameters() if x.ndim > 1)


def frozen(m: Model) -> Tensor:
    m.tokens.weight.requires_grad_(False)
    found = m.tokens.weight.norm() + m.head.weight.norm()
    m.tokens.weight.requires_grad_(True)
    return found


def averaged(m: Model) -> float:
    """An average of parameters, kept as users keep it."""
    average = [x.detach().clone() for x in m.parameters()]
    for x, new in zip(average, m.parameters(), strict=True):
        x.mul_(0.9).add_(new.detach(), alpha=0.2)
    return float(sum(x.square().sum() for x in average))


PENALTIES: dict[str, Callable[[Model], Any]] = {
    "norm": lambda m: m.head.weight.norm() + torch.linalg.vector_norm(m.tokens.weight, 3),
    "square": lambda m: sum(x.pow(2).sum() for x in m.parameters()),
    "absolute": lambda m: sum(x.abs().sum() for x in m.parameters()),
    "moments": lambda m: m.head.weight.mean() + m.head.bias.square().mean() + m.tokens.weight.std(),
    "largest": lambda m: m.head.weight.abs().max(),
    "detached": lambda m: (m.head.weight * m.head.weight.detach()).sum() + m.head.weight.detach().norm(),
    "from the start": lambda m: sum((x - y).square().sum() for x, y in zip(m.parameters(), m.began, strict=True)),
    "stacked": lambda m: torch.stack([x.norm() for x in m.parameters()]).norm(),
    "joined": lambda m: nn.utils.parameters_to_vector(m.parameters()).square().sum(),
    "at once": lambda m: torch.stack(torch._foreach_norm(list(m.parameters()))).sum(),
    "total": lambda m: nn.utils.get_total_norm(list(m.parameters())),
    "orthogonal": lambda m: (m.head.weight @ m.head.weight.T - torch.eye(NUM, dtype=torch.float64)).square().sum(),
    "tied": lambda m: (m.head.weight[:3] - m.tokens.weight[:3]).square().sum(),
    "scaled": lambda m: (m.head.weight * m.head.bias.sum() * torch.ones((), requires_grad=True)).mean(),
    "transposed": lambda m: m.head.weight.T[0].sum() + m.head.weight.mT.norm(),
    "in numbers": lambda m: m.head.weight.norm().item() + float(f"{m.tokens.weight.detach().sum():.12f}"),
    "frozen": frozen,
    "without gradients": without_gradients,
    "of gradients": of_gradients,
    "of hooks": of_hooks,
    "of autograd": of_autograd,
    "averaged": averaged,
}


def whole(x: Tensor) -> Tensor:
    return x.full_tensor().clone() if isinstance(x, DTensor) else x.clone()


def stepped(m: Model, names: list[str]) -> dict[str, list[Tensor]]:
    """Of each penalty: itself, the loss, the norm of all gradients, the gradients, and parameters after a step."""
    optimizer = torch.optim.AdamW(m.parameters(), lr=1e-3)
    m(tokens())  # which may cut parameters
    m.began = [x.detach().clone() for x in m.parameters()]
    with torch.no_grad():
        for x in m.parameters():
            x.add_(0.01)
    found = {}
    for name in names:
        penalty = PENALTIES[name](m)
        loss = m(tokens()).square().mean() + 0.1 * penalty
        loss.backward()
        total = nn.utils.clip_grad_norm_(m.parameters(), 0.5)
        numbers = [float(penalty.detach() if isinstance(penalty, Tensor) else penalty), loss.item(), total.item()]
        grads = [whole(x.grad) for x in m.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        found[name] = [torch.tensor(numbers, dtype=torch.float64), *grads, *(whole(x.detach()) for x in m.parameters())]
    return found


def on_ranks(rank: int, world_size: int, options: dict[str, Any], names: list[str]) -> dict[str, list[Tensor]]:
    return stepped(sptransform.parallelize(model(), backend="aot_eager", **options), names)


WAYS = [
    {"strategy": "megatron"},
    {"strategy": "ulysses", "shard_parameters": True},
    {"strategy": "megatron", "outputs": "full"},
]

QUICK = WAYS[1], 2, ["square", "of gradients"]


@pytest.mark.parametrize(
    ("options", "num_ranks", "names"),
    tiered(
        [QUICK, *((way, num_ranks, list(PENALTIES)) for way in WAYS for num_ranks in (2, 3))],
        quick=[QUICK],
    ),
)
def test_penalties(options: dict[str, Any], num_ranks: int, names: list[str]) -> None:
    assert_exact(get_pool(num_ranks).run(on_ranks, options, names, timeout=200), stepped(model(), names))


def assert_exact(ranks: list[dict[str, list[Tensor]]], expected: dict[str, list[Tensor]]) -> None:
    for found in ranks:
        for name, values in expected.items():
            for x, y in zip(found[name], values, strict=True):
                torch.testing.assert_close(x, y, rtol=EXACT, atol=EXACT, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [("ulysses", "megatron"), "usp"], ids=str)
def test_over_two_mesh_dims(strategy: Any) -> None:
    assert_exact(get_pool(4).run(over_two_dims, strategy, timeout=200), stepped(model(), list(PENALTIES)))


def over_two_dims(rank: int, world_size: int, strategy: Any) -> dict[str, list[Tensor]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    options = {"shard_parameters": True} if strategy == "usp" else {}
    return on_ranks(rank, world_size, {"strategy": strategy, "mesh": mesh, **options}, list(PENALTIES))


def kept(rank: int, world_size: int) -> tuple[list[str], list[str]]:
    """What else is done with parameters stays as it was; a penalty gathers nothing."""
    m = sptransform.parallelize(model(), "ulysses", backend="aot_eager", shard_parameters=True)
    m(tokens())
    with CountCollectives() as counted:
        sum(x.pow(2).sum() for x in m.parameters()).backward()
        assert sum(x.numel() for x in m.parameters()) == sum(x.numel() for x in model().parameters())
    state, names = m.state_dict(), []
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    for name, x in torch.load(file, weights_only=False).items():
        assert type(x) is DTensor and torch.equal(x.to_local(), state[name].to_local())
        assert state[name].to_local().data_ptr() == m.get_parameter(name).to_local().data_ptr()
        names.append(type(copy.deepcopy(m.get_parameter(name))).__name__)
    m.load_state_dict(state)
    assert all(isinstance(x, nn.Parameter) and isinstance(x, DTensor) for x in m.parameters())
    assert float(m.head.weight.norm()) == pytest.approx(float(model().head.weight.norm()), rel=1e-6)
    return names, [each.name for each in counted.collectives]


@pytest.mark.slow
def test_other_uses_are_as_ever() -> None:
    for names, collectives in get_pool(2).run(kept):
        assert set(names) == {"SharedParameter"}
        assert not [name for name in collectives if "gather" in name]
