"""Parallelized modules as stages of torch's pipelines: what stages hand each other stays cut along the sequence."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor

import sptransform
from tests.support.collective_counts import CountCollectives
from tests.support.gloo_pool import get_pool
from tests.support.models import HIDDEN, VOCAB, CausalBlock
from tests.support.tiers import tiered

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(
        "get_mesh" not in inspect.signature(PipelineStage).parameters, reason="stages of this torch take no DTensors"
    ),
]

BATCH, LENGTH, STEPS, MICROBATCHES = 4, 32, 3, 2


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.block = nn.Embedding(VOCAB, HIDDEN), CausalBlock()

    def forward(self, ids: Tensor) -> Tensor:
        return self.block(self.tokens(ids))


class Last(nn.Module):
    """Returns its loss, as a tensor that a pipeline can concatenate; labels come with the call, whole."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.norm = CausalBlock(), nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.norm(self.block(hidden)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).reshape(1)


def stages() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return First().double(), Last().double()


def batches(length: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randint(VOCAB, (2, BATCH, length), generator=generator)) for _ in range(STEPS)]


def one_device(length: int) -> tuple[list[float], list[dict[str, Tensor]]]:
    modules = stages()
    optimizer = torch.optim.SGD([x for module in modules for x in module.parameters()], lr=0.1)
    losses = []
    for ids, labels in batches(length):
        optimizer.zero_grad()
        loss = modules[1](modules[0](ids), labels).squeeze()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, [{name: x.detach() for name, x in module.named_parameters()} for module in modules]


def piped(
    rank: int, world_size: int, strategy: str, length: int
) -> tuple[int, list[float], dict[str, Tensor], set[str]]:
    """The stage, its losses if it is the last, its parameters, and the kinds of collectives inside of stages."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "sp"))
    index = mesh["pp"].get_local_rank()
    module = sptransform.parallelize(stages()[index], strategy, mesh=mesh["sp"], backend="aot_eager")
    stage = PipelineStage(
        module, index, 2, torch.device("cpu"), group=mesh["pp"].get_group(), get_mesh=lambda names, layout: mesh["sp"]
    )
    schedule = Schedule1F1B(stage, MICROBATCHES, loss_fn=lambda loss, labels: loss.squeeze())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    with CountCollectives() as counted:
        for ids, labels in batches(length):
            optimizer.zero_grad()
            of_microbatches: list[Tensor] = []
            if index == 0:
                schedule.step(ids)
            else:
                schedule.step(labels=labels, target=labels, losses=of_microbatches)
                losses.append(float(sum(of_microbatches)) / MICROBATCHES)
            optimizer.step()
    whole = {
        name: (x.full_tensor() if isinstance(x, DTensor) else x).detach() for name, x in module.named_parameters()
    }
    return index, losses, whole, {collective.name for collective in counted.collectives}


@pytest.mark.parametrize(
    ("strategy", "length"), tiered([("ring", 30), ("megatron", 32), ("ulysses", 32)], quick=[("ring", 30)])
)
def test_three_steps_are_those_of_one_device(strategy: str, length: int) -> None:
    losses, expected = one_device(length)
    for index, got, parameters, kinds in get_pool(4).run(piped, strategy, length, timeout=200):
        if index == 1:
            assert got == pytest.approx(losses, rel=1e-10)
        for name, parameter in expected[index].items():
            torch.testing.assert_close(parameters[name], parameter, rtol=1e-10, atol=1e-10, msg=name)
        assert strategy == "megatron" or "all_gather_into_tensor" not in kinds  # nobody has a whole sequence
