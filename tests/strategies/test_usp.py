"""Ulysses x ring: which degrees are chosen, and two mesh dims under a mask of positions."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import pytest
import torch

from sptransform import USP, Ring, Ulysses, UsageError, verify
from sptransform.agreement.program import placement_lines
from sptransform.engine.strategy import Stage
from sptransform.sharding.mesh import Mesh
from sptransform.testing.lockstep import in_lockstep
from tests.cli.factories import Attention
from tests.end_to_end.test_counts_rings import D, H, Packed
from tests.support.graphs import assert_ranks_equal_one_device, run_once
from tests.support.rewritten import Asked, function_on_ranks, runnables

RANKS = range(1, 49)
HEADS = [(k * g, k) for k in (1, 2, 3, 4, 6, 8, 12, 16, 32) for g in (1, 2, 3, 4, 7, 8)]


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def sent(ring: int, ulysses: int, heads: list[tuple[int, int]]) -> Fraction:
    """Elements a rank sends forward in attention, in units of batch * tokens a rank * head size."""
    return sum(
        (2 * (h + k) * (1 - Fraction(1, ulysses)) + 2 * k * (ring - 1) for h, k in heads),
        Fraction(0),
    )


@pytest.mark.parametrize(("h", "k"), HEADS)
def test_the_rule(h: int, k: int) -> None:
    """A ring while N < H/K + 1, else the largest divisor of N that divides K, and a ring for the rest."""
    for n in RANKS:
        expected = 1 if n < h // k + 1 else max(u for u in divisors(n) if k % u == 0)
        assert USP().degrees(n, [(h, k)]) == (n // expected, expected), n


@pytest.mark.parametrize(("h", "k"), HEADS)
def test_nothing_sends_less(h: int, k: int) -> None:
    for n in RANKS:
        every = [sent(n // u, u, [(h, k)]) for u in divisors(n) if k % u == 0]
        assert sent(*USP().degrees(n, [(h, k)]), [(h, k)]) == min(every), n


def test_layers_with_different_heads_share_the_degrees() -> None:
    """Only what divides the key heads of all layers is considered; what is counted is the sum."""
    for n, layers in itertools.product((4, 8, 12, 24), ([(8, 8), (8, 4)], [(12, 12), (12, 8)], [(32, 8), (8, 1)])):
        usable = [u for u in divisors(n) if all(k % u == 0 for _, k in layers)]
        ring, ulysses = USP().degrees(n, layers)
        assert ring * ulysses == n and ulysses in usable
        assert sent(ring, ulysses, layers) == min(sent(n // u, u, layers) for u in usable)


@pytest.mark.parametrize("n", [1, 2, 6])
def test_a_graph_without_attention(n: int) -> None:
    ring, ulysses = USP().degrees(n, [])
    assert ring * ulysses == n


@pytest.mark.parametrize(
    ("strategy", "degrees"),
    [
        (USP(2, 4), (4, 2)),
        (USP(ulysses=4), (2, 4)),
        (USP(ring=8), (8, 1)),
        (USP(ring=1), (1, 8)),  # more ranks than key heads: some share one
        (USP(ulysses=8), (1, 8)),
    ],
    ids=str,
)
def test_explicit_degrees(strategy: USP, degrees: tuple[int, int]) -> None:
    assert strategy.degrees(8, [(8, 4)]) == degrees


def test_stages() -> None:
    """A degree of one is no mesh dim: what is left is the other strategy on the ranks as they are."""
    mesh = Mesh.pretended(8, 5)
    assert USP(1, 8).stages(mesh, [(8, 8)]) == [Stage(Ring(), mesh)]
    assert USP(8, 1).stages(mesh, [(8, 8)]) == [Stage(Ulysses(), mesh)]
    assert USP(layout="contiguous").stages(mesh, [(8, 1)]) == [Stage(Ring("contiguous"), mesh)]
    outer, inner = mesh.split(4, 2)
    assert USP(2, 4, "contiguous").stages(mesh, [(8, 8)]) == [Stage(Ring("contiguous"), outer), Stage(Ulysses(), inner)]


@pytest.mark.parametrize(
    ("strategy", "shape", "expected"),
    [
        (USP(), (8,), [(4, 2), (2, 4)]),
        (USP(2), (8,), [(4, 2)]),
        (USP(ring=1), (8,), []),  # no groups to make
        (USP(), (2, 4), [(2, 4)]),
        (USP(4), (2, 4), [(2, 4)]),
        (USP(), (8, 1), [(8, 1)]),
        (Ring(), (8,), []),
    ],
    ids=str,
)
def test_groups_that_may_be_needed(strategy: USP, shape: tuple[int, ...], expected: list[tuple[int, int]]) -> None:
    assert sorted(strategy.mesh_shapes(8, shape)) == sorted(expected)


@pytest.mark.parametrize(
    ("strategy", "shape"), [(USP(3), (8,)), (USP(2, 2), (8,)), (USP(2, 4), (2, 4)), (USP(ring=3), (8,))], ids=str
)
def test_degrees_that_are_not_the_ranks(strategy: USP, shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="the ranks are not ring x ulysses"):
        strategy.mesh_shapes(8, shape)


@pytest.mark.parametrize("seq_len", [40, 37])
def test_masks_of_positions_over_two_mesh_dims(seq_len: int) -> None:
    """The second dim's ranks hold a part of the keys, and a mask over all of them."""
    torch.manual_seed(0)
    model = Packed().double()
    x = torch.randn(1, seq_len, H * D, dtype=torch.float64, requires_grad=True)
    inputs = {"x": x, "documents": torch.arange(seq_len)[None] // 7}
    meshes = [Mesh.pretended(4, rank) for rank in range(4)]
    graphs = runnables(model, inputs, meshes, strategy=USP(2, 2), outputs="full")
    ranks = in_lockstep(4, lambda rank: run_once(graphs[rank].graph_module, graphs[rank].inputs), inner=2)
    names = graphs[0].names

    def on_one_device(*args: torch.Tensor) -> torch.Tensor:
        named = zip(names, args, strict=True)
        parameters = {name: x for name, x in named if name is not None}
        given = [x for name, x in zip(names, args, strict=True) if name is None]
        return torch.func.functional_call(model, parameters, tuple(given))

    assert_ranks_equal_one_device(run_once(on_one_device, graphs[0].inputs), ranks)


@pytest.mark.parametrize("rank", range(4))
def test_attention_to_one_token_on_a_ring_rank_is_refused_on_every_rank(rank: int) -> None:
    """One token looks like no sequence: that rank would go on with other collectives than the rest."""
    x = torch.randn(1, 3, H * D, dtype=torch.float64)
    inputs = {"x": x, "documents": torch.zeros(1, 3, dtype=torch.long)}
    with pytest.raises(UsageError, match="3 tokens, shares of 2, 1 on the first"):
        runnables(Packed().double(), inputs, [Mesh.pretended(4, rank)], strategy=USP(2, 2))


def test_a_sequence_of_one_token_each_runs() -> None:
    inputs = {"x": torch.randn(1, 2, H * D, dtype=torch.float64), "documents": torch.zeros(1, 2, dtype=torch.long)}
    (graph, *_) = runnables(Packed().double(), inputs, [Mesh.pretended(4)], strategy=USP(2, 2))
    assert len(graph.context.result.mesh_dims) == 2


@pytest.mark.parametrize(("kept", "alike"), [(13, True), (9, True), (5, False), (3, True), (1, True)])
def test_ranks_that_would_meet_with_other_placements_say_so(kept: int, alike: bool) -> None:
    """A sum over five tokens is pending for the ranks that have four of them, and whole for those that have one."""

    def loss_of_the_first(x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(-1, (4, 2)).transpose(1, 2)
        out = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        return out[:, :, :kept].pow(2).sum()

    x = torch.randn(1, 13, 8, dtype=torch.float64, requires_grad=True)
    ranks = function_on_ranks(loss_of_the_first, [x], Asked(4, USP(2, 2)))
    outer = [graph.context.result.mesh_dims[0].mesh for graph in ranks.graphs]
    lines = [placement_lines(graph.graph_module.graph, mesh) for graph, mesh in zip(ranks.graphs, outer, strict=True)]
    assert lines[0] and lines[0] == lines[1] and lines[2] == lines[3]
    assert ([x.text for x in lines[0]] == [x.text for x in lines[2]]) == alike
    if kept == 13:  # what communicates over the first mesh dim, and nothing else
        assert [x.text.split()[0] for x in lines[0]] == ["%x0_S_1", "%ring_attention", "%sum_1_I"]
    if alike:
        runs = ranks.run(lambda graph: run_once(graph.graph_module, graph.inputs))
        assert_ranks_equal_one_device(run_once(loss_of_the_first, [x]), runs)


class ClassToken(torch.nn.Module):
    """Puts a learned token before the sequence, and returns what became of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Parameter(torch.randn(1, 1, 16))
        self.attention = Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1)
        return self.attention(x)[:, 0].square().mean()


@pytest.mark.parametrize(
    ("strategy", "world_size"),
    [(USP(2, 2), 4), (("ring", "megatron"), (2, 2)), (("ulysses", "megatron"), (2, 2))],
    ids=str,
)
def test_one_entry_of_a_sequence_over_two_mesh_dims(strategy: Any, world_size: Any) -> None:
    """What the first dim's ranks run, to find the entry, and in place of the token that others own, has rules."""
    torch.manual_seed(0)
    verdict = verify(
        ClassToken(), strategy, (torch.randn(2, 16, 16),), world_size=world_size, processes=False, strict=True
    )
    assert verdict.ok, verdict
