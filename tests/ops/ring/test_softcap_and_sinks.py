"""Softcap and sinks on N ranks against their definition on one device, in float64; and the kernel that serves them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sptransform.ops.ring.kernels import reference
from sptransform.ops.ring.merging import grad_of_sinks, is_sunk
from sptransform.sharding.partition import Partition
from tests.ops.ring.ranks import Problem, Ring, Run, assert_equal, visible

sp = torch.ops.sptransform

HEADS, SIZE, CAP = 4, 31, 0.9
SINKS = torch.tensor([0.3, -1.2, 2.5, 9.0], dtype=torch.float64)
LOWEST = torch.finfo(torch.float64).min


def defined(
    problem: Problem, mask: Tensor, *, softcap: float, sinks: Tensor | None, scale: float = 8**-0.5,
    heads: tuple[int, ...] = (0, 0, 1, 1), kept: Tensor | float = 1.0,
) -> Run:  # fmt: skip
    """Result and gradients, that of the sinks last, as models spell it out. ``kept`` multiplies probabilities."""
    leaves = [problem.query, problem.key, problem.value, *([] if sinks is None else [sinks])]
    xs = [x.detach().requires_grad_() for x in leaves]
    scores = xs[0] @ xs[1][:, list(heads)].mT * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat([scores, xs[3].reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    probabilities = torch.ops.aten._safe_softmax(scores, -1)[..., : mask.shape[-1]]
    out = (probabilities * kept) @ xs[2][:, list(heads)]
    return out.detach(), list(torch.autograd.grad(out, xs, problem.grad))


def of_ranks(ring: Ring, problem: Problem) -> Run:
    """The same of ranks: of the sinks every rank has a summand, from its own queries."""
    out, grads = ring.run(problem)
    if ring.sinks is None:
        return out, grads
    results = ring.forward(problem)
    summands = [
        grad_of_sinks(ring.backward_arguments(problem, rank, result)[0], result[0], result[1], ring.sinks)
        for rank, result in results.items()
    ]
    return out, [*grads, sum(summands)]


def assert_same(found: Run, expected: Run) -> None:
    assert_equal((found[0], found[1][:3]), (expected[0], expected[1][:3]))
    for x, y in zip(found[1][3:], expected[1][3:], strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-12, msg=lambda text: f"sinks: {text}")


def shared(num_ranks: int, layout: str = "zigzag", **fields: Any) -> Ring:
    partition = getattr(Partition, layout)(SIZE, num_ranks)
    return Ring(partition, partition, **fields)


KINDS = {"softcap": (CAP, None), "sinks": (0.0, SINKS), "both": (CAP, SINKS)}


@pytest.mark.covering(ways=2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("nearest", "farthest"), [(0, None), (0, 6), (3, 9), (None, None)])
@pytest.mark.parametrize(("num_ranks", "layout"), [(1, "zigzag"), (3, "zigzag"), (4, "contiguous")])
@pytest.mark.parametrize("circulates", [True, False])
def test_bands(
    kind: str, nearest: int | None, farthest: int | None, num_ranks: int, layout: str, circulates: bool
) -> None:
    """Lengths that the ranks do not share evenly; the third band hides all keys from the first rows."""
    softcap, sinks = KINDS[kind]
    problem = Problem.random(SIZE)
    options = {"nearest": nearest, "farthest": farthest, "softcap": softcap}
    ring = shared(num_ranks, layout, options=options, circulates=circulates, sinks=sinks)
    mask = visible(SIZE, SIZE, nearest, farthest)
    assert_same(of_ranks(ring, problem), defined(problem, mask, softcap=softcap, sinks=sinks))


def _masks() -> dict[str, tuple[str, list[Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(3)
    arbitrary = torch.rand(1, HEADS, SIZE, SIZE, generator=generator) > 0.4
    arbitrary[:, :, 4] = False
    added = torch.randn(2, 1, SIZE, SIZE, generator=generator, dtype=torch.float64)
    added[:, :, 6] = -math.inf
    sunk = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.float64)
    sunk[:, :, 8], sunk[..., 3:6], sunk[:, :, 9] = -1e30, -1e30, LOWEST
    return {"arbitrary": ("%0", [arbitrary], arbitrary), "added": ("%0", [added], added), "low": ("%0", [sunk], sunk)}


@pytest.mark.parametrize("name", _masks())
@pytest.mark.parametrize("kind", ["sinks", "both"])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_masks(name: str, kind: str, num_ranks: int) -> None:
    """A row without keys has its sink alone; so has a row of which all keys are masked by a large number."""
    softcap, sinks = KINDS[kind]
    problem = Problem.random(SIZE)
    program, rows, mask = _masks()[name]
    ring = shared(num_ranks, rows=tuple(rows), options={"mask": program, "softcap": softcap}, sinks=sinks)
    found = of_ranks(ring, problem)
    assert_same(found, defined(problem, mask, softcap=softcap, sinks=sinks))
    if name == "low":
        assert found[0][:, :, 8:10].count_nonzero() == 0
        assert not any(is_sunk(lse, torch.float64).any() for _, lse, _ in ring.forward(problem).values())


def test_a_mask_of_low_numbers_without_sinks_is_a_mean() -> None:
    problem = Problem.random(SIZE)
    program, rows, mask = _masks()["low"]
    ring = shared(3, rows=tuple(rows), options={"mask": program, "softcap": CAP})
    # scores are of no account beside such numbers
    assert_same(of_ranks(ring, problem), defined(problem, mask, softcap=CAP, sinks=None))


@pytest.mark.parametrize("heads", [(0, 0, 1, 1), (0, 1, 1, 1), (1, 0, 0, 1)], ids=str)
def test_heads_and_scale(heads: tuple[int, ...]) -> None:
    """Sinks are those of query heads, in their order."""
    problem = Problem.random(SIZE, value_dim=5)
    options = {"nearest": 0, "softcap": CAP, "scale": 0.7, "key_head_of": list(heads)}
    expected = defined(problem, visible(SIZE, SIZE, 0, None), softcap=CAP, sinks=SINKS, scale=0.7, heads=heads)
    assert_same(of_ranks(shared(2, options=options, sinks=SINKS), problem), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is dropped is read off the forward: it enters neither the denominator nor the sinks' share of it."""
    monkeypatch.setattr(reference, "TILE", 4)  # which draw apart
    softcap, sinks = KINDS[kind]
    problem, p = Problem.random(SIZE), 0.4
    ring = shared(3, options={"nearest": 0, "softcap": softcap, "dropout_p": p}, sinks=sinks)
    unit = torch.eye(SIZE, dtype=torch.float64).expand(2, 2, SIZE, SIZE)
    torch.manual_seed(5)
    kept = ring.forward(Problem(problem.query, problem.key, unit, problem.grad))
    found = torch.zeros(2, HEADS, SIZE, SIZE, dtype=torch.float64)
    for rank, (out, *_) in kept.items():
        at = 0
        for lo, hi in ring.queries.owned[rank]:
            found[:, :, lo:hi] = out[:, :, at : at + hi - lo]
            at += hi - lo
    torch.manual_seed(5)
    out, grads = ring.run(problem)
    torch.manual_seed(5)
    results = ring.forward(problem)
    if sinks is not None:
        grads.append(
            sum(
                grad_of_sinks(ring.backward_arguments(problem, rank, result)[0], *result[:2], sinks)
                for rank, result in results.items()
            )
        )
    seen = visible(SIZE, SIZE, 0, None)
    expected = defined(problem, seen, softcap=softcap, sinks=sinks, kept=(found != 0).double() / (1 - p))
    assert_same((out, grads), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_op_has_the_gradients_of_its_definition(kind: str) -> None:
    softcap, sinks = KINDS[kind]
    problem = Problem.random(SIZE)
    xs = [x.detach().requires_grad_() for x in (problem.query, problem.key, problem.value)]
    xs += [] if sinks is None else [sinks.detach().requires_grad_()]
    out, *_ = sp.ring_attention(*xs[:3], [], [], *xs[3:], nearest=0, softcap=softcap)
    found = out.detach(), list(torch.autograd.grad(out, xs, problem.grad))
    assert_same(found, defined(problem, visible(SIZE, SIZE, 0, None), softcap=softcap, sinks=sinks))


def test_sinks_without_a_number() -> None:
    """-inf is no sink; and beside a row without keys it is no NaN."""
    problem = Problem.random(SIZE)
    xs = [x.detach().requires_grad_() for x in (problem.query, problem.key, problem.value)]
    none = torch.full([HEADS], -math.inf, dtype=torch.float64, requires_grad=True)
    out, *_ = sp.ring_attention(*xs, [], [], none, nearest=3)
    *grads, of_sinks = torch.autograd.grad(out, [*xs, none], problem.grad)
    expected = defined(problem, visible(SIZE, SIZE, 3, None), softcap=0.0, sinks=None)
    assert_same((out.detach(), grads), expected)
    assert of_sinks.count_nonzero() == 0


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that an op made."""

    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(results):
            if isinstance(x, Tensor):
                self.num = max(self.num, x.untyped_storage().nbytes() // x.itemsize)
        return results


@pytest.mark.parametrize(("causal", "masked"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_reference_kernel_computes_tiles_of_rows(
    causal: bool, masked: bool, dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same in tiles as in one piece, and no tensor of all queries and keys is made."""
    rows, size, tile = 50, 50, 8
    problem = Problem.random(rows, size, dim=3)
    xs = problem.query, problem.key, problem.value
    mask = (torch.arange(size) % 5 != 2)[None] if masked else None
    options = {"softcap": CAP, "dropout_p": dropout_p, "seed": torch.tensor(11)}

    def run() -> list[Tensor]:
        out, lse = sp.attention_block(*xs, mask, causal, **options)
        return [out, lse, *sp.attention_block_backward(problem.grad, *xs, mask, out, lse, causal, **options)]

    whole = run()
    monkeypatch.setattr(reference, "TILE", tile)
    with Largest() as largest:
        tiled = run()
    assert largest.num <= max(2 * HEADS * tile * size, rows * size)
    if dropout_p == 0.0:  # each tile draws for itself
        for x, y in zip(tiled, whole, strict=True):
            torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-12)
    for x, y in zip(tiled, run(), strict=True):
        assert torch.equal(x, y)
