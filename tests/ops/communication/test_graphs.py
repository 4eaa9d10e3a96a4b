"""What compilers see of a change of placement: the same ops on every rank where shares are even, no length baked in."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

import sptransform.ops  # noqa: F401 - registers the ops
from sptransform.ops.local_slice import local_slice_for
from sptransform.sharding.mesh import PRETENDED_GROUP
from sptransform.sharding.partition import BLOCKS_PER_RANK, Partition
from sptransform.sharding.placement import I, P, Placement, R, Shard
from sptransform.sharding.sizes import Size
from sptransform.strategies.ulysses import Ulysses
from sptransform.testing.lockstep import in_lockstep
from tests.passes.blocks import Attention, hidden_states
from tests.support.brute_force import randn
from tests.support.graphs import on_ranks
from tests.support.redistributes import EVEN, TAKES_LIST, Change, change
from tests.support.tiers import tiered

NUM_RANKS = 4
FOLDED, ODD = Shard(1, Partition.zigzag(16, 4)), Shard(1, Partition.zigzag(12, 4))
STRIPED = Shard(1, Partition.striped(12, 4, 2))  # a whole round of blocks, and a shorter one
BLOCKS, HEADS = Shard(1, Partition.contiguous(16, 4)), Shard(2, Partition.contiguous(4, 4))


def traced(changed: Change, *, symbolic: str = "") -> fx.GraphModule:
    """Forward and backward of the op that does it, on rank 0's part; ``symbolic`` stands for sizes left open.

    No group exists and none is pretended: to ask for the rank would be an error.
    """
    (source,), (target,), (shape,) = changed.sources, changed.targets, changed.shapes
    name, arguments = changed.op()
    arguments = tuple(_argument(x, symbolic) for x in arguments)

    def run(x: torch.Tensor, cotangent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().requires_grad_()
        op = getattr(torch.ops.sptransform, name)
        y = op([x], *arguments)[0] if name in TAKES_LIST else op(x, *arguments)
        return y, torch.autograd.grad(y, x, cotangent)[0]

    inputs = [torch.empty(_local(placement, shape), dtype=torch.float64) for placement in (source, target)]
    return make_fx(run, tracing_mode="symbolic" if symbolic else "fake")(*inputs)


def _argument(x: object, symbolic: str) -> object:
    if isinstance(x, list):
        return [_argument(item, symbolic) for item in x]
    if x == "group":
        return PRETENDED_GROUP
    if not symbolic or not isinstance(x, str):
        return x
    # of an open length, the number of blocks is known and not their size
    x = re.sub(rf"{symbolic}(\d+)s\d+", rf"{symbolic}\1s/{BLOCKS_PER_RANK}", x)
    return x.replace(symbolic, "?/")


def _local(placement: Placement, shape: tuple[int, ...], rank: int = 0) -> tuple[int, ...]:
    return placement.local_shape(shape, rank) if isinstance(placement, Shard) else shape


def collectives(gm: fx.GraphModule) -> list[str]:
    names = [node.target._schema.name for node in gm.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    named = [name.split("::") for name in names]
    return [
        name
        for namespace, name in named
        if (namespace, name) == ("sptransform", "repartition")
        or (namespace == "_c10d_functional" and name != "wait_tensor")
    ]


@pytest.mark.parametrize("changed", [x for x in EVEN if len(x.shapes) == 1], ids=str)
def test_even_shares_are_moved_without_asking_for_the_rank(changed: Change) -> None:
    traced(changed)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (change((2, 16, 3), FOLDED, R), ["all_gather_into_tensor", "reduce_scatter_tensor"]),
        (change((2, 16, 3), P, FOLDED), ["reduce_scatter_tensor", "all_gather_into_tensor"]),
        (change((2, 16, 4), FOLDED, HEADS), ["all_to_all_single"] * 2),
        (change((2, 12, 4), ODD, HEADS), ["all_to_all_single"] * 2),
        (change((2, 16, 4), FOLDED, BLOCKS), ["repartition"] * 2),
        (change((2, 12, 3), STRIPED, R), ["all_gather_into_tensor", "reduce_scatter_tensor"]),
        (change((2, 12, 4), STRIPED, HEADS), ["all_to_all_single"] * 2),
    ],
    ids=str,
)
def test_one_collective_each_way(changed: Change, expected: list[str]) -> None:
    assert collectives(traced(changed)) == expected


@pytest.mark.parametrize(
    ("kind", "outer"),
    tiered(
        [
            *((kind, 1) for kind in ("R->S", "I->S", "P->S", "S->I", "S->heads", "heads->S", "S->blocks", "blocks->S")),
            *((kind, 3) for kind in ("S->R", "S->heads", "S->blocks")),
            *((kind, 1) for kind in ("stripes->R", "P->stripes", "stripes->heads", "heads->stripes")),
            *((kind, 3) for kind in ("stripes->heads", "stripes->blocks")),
            *((kind, outer) for kind in ("blocks->R", "blocks->I", "I->blocks", "P->blocks") for outer in (1, 3)),
        ],
        quick=[("R->S", 1), ("S->I", 1), ("S->R", 3), ("S->heads", 3), ("blocks->R", 3), ("P->blocks", 1)]
        + [("stripes->R", 1), ("stripes->heads", 3)],
    ),
)
def test_a_graph_of_open_lengths_serves_them_all(kind: str, outer: int) -> None:
    """Traced at one length, run at others, on all ranks."""

    def at(length: int) -> Change:
        forms = {"S": Partition.zigzag, "blocks": Partition.blocks, "stripes": Partition.striped}
        shards = {name: Shard(1, form(length, NUM_RANKS), outer) for name, form in forms.items()}
        ends = {**shards, "R": R, "I": I, "P": P, "heads": HEADS}
        source, target = kind.split("->")
        return change((2, outer * length, 4), ends[source], ends[target])

    one = BLOCKS_PER_RANK * NUM_RANKS * 3 if "stripes" in kind else 24
    gm = traced(at(one), symbolic=f"{one}/")
    for length in (one, 2 * one):
        changed = at(length)
        ((shape,), (source,), (target,)) = changed.shapes, changed.sources, changed.targets
        x, cotangent = randn(*shape), randn(*shape)

        def part(whole: torch.Tensor, placement: Placement, rank: int) -> torch.Tensor:
            return local_slice_for(whole, placement, rank) if isinstance(placement, Shard) else whole

        results = in_lockstep(
            NUM_RANKS,
            lambda rank: gm(part(x, source, rank), part(cotangent, target, rank)),  # noqa: B023
        )
        # a pending sum of wholes is NUM_RANKS times the whole; a gradient of R is a pending sum too
        for rank, (y, grad) in enumerate(results):
            expected = part(x, target, rank) * (NUM_RANKS if source == P else 1)
            torch.testing.assert_close(y, expected)
            if source == R:
                torch.testing.assert_close(sum(other for _, other in results), cotangent)
            else:
                torch.testing.assert_close(grad, part(cotangent, source, rank) * (NUM_RANKS if target == R else 1))


@dataclass(frozen=True)
class Folded(Ulysses):
    """Ulysses over sequences that the ranks share as a zigzag."""

    def partition(self, size: Size, num_ranks: int, is_causal: bool) -> Partition:
        return Partition.zigzag(size, num_ranks)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_model_has_one_graph_for_all_ranks_and_returns_the_original_order(num_ranks: int) -> None:
    reference, ranks, graphs = on_ranks(
        Attention(), hidden_states(), num_ranks=num_ranks, strategy=Folded(), outputs="local"
    )
    assert len({gm.code for gm in graphs}) == 1
    assert f"S(1:8/{num_ranks}z)" in graphs[0].code
    torch.testing.assert_close(torch.cat([run.outputs[0] for run in ranks], 1), reference.outputs[0])
    for run in ranks:
        torch.testing.assert_close(run.grads, reference.grads)
