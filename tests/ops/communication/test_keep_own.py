"""Of indices that ranks share each is kept by its first owner: nothing is sent, and the gradient comes back in full."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from sptransform.ops.groups import pretend
from sptransform.ops.local_slice import local_slice_for
from sptransform.sharding.mesh import PRETENDED_GROUP
from sptransform.sharding.partition import Partition
from sptransform.sharding.placement import Shard, keeps_own
from sptransform.testing.lockstep import in_lockstep
from tests.support.brute_force import randn, together
from tests.support.redistributes import Change, Op, PerRank, check


@dataclass(frozen=True)
class Kept(Change):
    def op(self) -> Op:
        (source,), (target,) = self.sources, self.targets
        return "keep_own", (source.spec, target.spec, "group")


def kept(shape: tuple[int, ...], source: Shard) -> Kept:
    return Kept((shape,), (source,), (replace(source, partition=source.partition.first_owners()),))


def together_in_turns(
    name: str, arguments: tuple[Any, ...], inputs: PerRank, cotangents: PerRank
) -> tuple[PerRank, PerRank]:
    arguments = tuple(PRETENDED_GROUP if argument == "group" else argument for argument in arguments)

    def run(rank: int) -> tuple[list[Tensor], list[Tensor]]:
        (x,) = (x.clone().requires_grad_() for x in inputs[rank])
        y = getattr(torch.ops.sptransform, name)(x, *arguments)
        return [y.detach()], list(torch.autograd.grad(y, x, cotangents[rank][0]))

    outputs, grads = zip(*in_lockstep(len(inputs), run), strict=True)
    return list(outputs), list(grads)


CASES = [
    kept((2, 3, 1, 4), Shard(2, Partition.contiguous(4, 4).quotient(4))),  # one key head for all ranks
    kept((2, 3, 2, 4), Shard(2, Partition.contiguous(4, 4).quotient(2))),  # one for every two
    kept((2, 3, 2, 4), Shard(2, Partition.balanced(4, 3).quotient(2))),
    kept((6, 8), Shard(1, Partition.balanced(4, 3).quotient(2).refine(4))),
    kept((6, 8), Shard(1, Partition.balanced(4, 3).quotient(2).refine(2), outer=2)),
    kept((8, 2), Shard(0, Partition.of(8, [[(0, 5)], [(3, 4), (2, 8)], []]))),
]


@pytest.mark.parametrize("changed", CASES, ids=str)
def test_value_and_gradient(changed: Kept) -> None:
    (source,), (target,) = changed.sources, changed.targets
    assert keeps_own(source, target)
    check(changed, source.partition.num_ranks, _summing_gradients(changed))


def _summing_gradients(changed: Kept) -> Any:
    """The gradient of a shared part is a pending sum over those who share it: every sharer is to have it summed."""
    (source,), (shape,) = changed.sources, changed.shapes

    def run(name: str, arguments: tuple[Any, ...], inputs: PerRank, cotangents: PerRank) -> tuple[PerRank, PerRank]:
        outputs, grads = together_in_turns(name, arguments, inputs, cotangents)
        for x, grad in zip(inputs, grads, strict=True):
            assert x[0].shape == grad[0].shape
        whole = together([grad for (grad,) in grads], source)
        assert tuple(whole.shape) == shape
        return outputs, [[local_slice_for(whole, source, rank)] for rank in range(len(grads))]

    return run


def test_a_rank_that_is_not_the_first_owner_has_no_gradient() -> None:
    (source,), (target,) = CASES[1].sources, CASES[1].targets
    x, arguments = randn(2, 3, 1, 4), (source.spec, target.spec, "group")
    cotangents = [[randn(2, 3, target.partition.local_size(rank), 4)] for rank in range(4)]
    _, grads = together_in_turns("keep_own", arguments, [[x]] * 4, cotangents)
    assert [bool(grad.count_nonzero()) for (grad,) in grads] == [True, False, True, False]


@pytest.mark.parametrize("rank", range(4))
def test_nothing_is_sent(rank: int) -> None:
    (source,), (target,) = CASES[1].sources, CASES[1].targets

    def run(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        y = torch.ops.sptransform.keep_own(x, source.spec, target.spec, PRETENDED_GROUP)
        return torch.autograd.grad(y, x, torch.ones_like(y))[0]

    with pretend(PRETENDED_GROUP, rank):
        gm = make_fx(run, tracing_mode="fake")(randn(2, 3, 1, 4))
    namespaces = {node.target.namespace for node in gm.graph.nodes if node.op == "call_function"}
    assert namespaces <= {"aten", "sptransform"}
