"""The op on N ranks against torch's attention on one device: results and gradients, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sptransform.sharding.partition import Partition
from tests.ops.ring.ranks import Problem, Ring, assert_equal, one_device, visible

RANKS = [1, 2, 3, 4, 8]
CAUSAL = {"nearest": 0}


def ring(num_ranks: int, size: int, layout: str = "zigzag", num_keys: int | None = None, **fields: Any) -> Ring:
    form = getattr(Partition, layout)
    return Ring(form(size, num_ranks), form(num_keys or size, num_ranks), **fields)


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize(("layout", "size"), [("zigzag", 48), ("zigzag", 37), ("zigzag", 5), ("contiguous", 37)])
def test_causal(num_ranks: int, layout: str, size: int) -> None:
    """Also sizes that N does not divide, and ranks that own nothing."""
    problem = Problem.random(size)
    expected = one_device(problem, visible(size, size, 0, None))
    assert_equal(ring(num_ranks, size, layout, options=CAUSAL).run(problem), expected)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(48, 48), (21, 34), (40, 3)])
def test_bidirectional_and_cross(num_ranks: int, num_queries: int, num_keys: int) -> None:
    problem = Problem.random(num_queries, num_keys)
    assert_equal(ring(num_ranks, num_queries, "contiguous", num_keys).run(problem), one_device(problem))


@pytest.mark.parametrize("num_ranks", [1, 3, 4])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize(("nearest", "farthest"), [(0, 6), (-4, 4), (-2, None), (3, 9)])
def test_windows(num_ranks: int, layout: str, nearest: int, farthest: int | None) -> None:
    """The last one hides all keys from the first rows: zeros, and no gradient."""
    problem = Problem.random(37)
    options = {"nearest": nearest, "farthest": farthest}
    expected = one_device(problem, visible(37, 37, nearest, farthest))
    assert_equal(ring(num_ranks, 37, layout, options=options).run(problem), expected)


@pytest.mark.parametrize(
    ("heads", "key_heads", "key_head_of"), [(4, 4, []), (6, 2, []), (3, 1, []), (4, 2, [0, 1, 1, 1]), (2, 3, [2, 0])]
)
def test_heads(heads: int, key_heads: int, key_head_of: list[int]) -> None:
    problem = Problem.random(24, heads=heads, key_heads=key_heads)
    expected = one_device(problem, visible(24, 24, 0, None), key_head_of=key_head_of)
    assert_equal(ring(3, 24, options={**CAUSAL, "key_head_of": key_head_of}).run(problem), expected)


def test_scale_and_another_value_dim() -> None:
    problem = Problem.random(24, value_dim=5)
    expected = one_device(problem, visible(24, 24, 0, None), scale=0.9)
    assert_equal(ring(4, 24, options={**CAUSAL, "scale": 0.9}).run(problem), expected)


@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_whole_keys_that_do_not_circulate(layout: str, key_heads: int) -> None:
    """The local form of all-gathered keys: every rank's gradients of them are a part of the sum."""
    problem = Problem.random(29, key_heads=key_heads)
    expected = one_device(problem, visible(29, 29, 0, None))
    assert_equal(ring(3, 29, layout, options=CAUSAL, circulates=False).run(problem), expected)


@pytest.mark.parametrize(("layout", "text"), [("zigzag", "?/3z"), ("contiguous", "?/3")])
def test_open_sizes(layout: str, text: str) -> None:
    """A partition whose size is read off the tensors, as graphs of symbolic lengths have it."""
    problem = Problem.random(24)
    shared = ring(3, 24, layout, options={**CAUSAL, "queries": text, "keys": text})
    assert_equal(shared.run(problem), one_device(problem, visible(24, 24, 0, None)))


def test_other_partitions() -> None:
    """Queries and keys cut unlike each other, in an order that is not that of positions."""
    problem = Problem.random(20, 12)
    queries = Partition.of(20, [[(10, 13), (2, 4)], [(0, 2), (4, 10)], [(13, 20)]])
    keys = Partition.of(12, [[], [(6, 12)], [(3, 6), (0, 3)]])
    expected = one_device(problem, visible(20, 12, -2, 11))
    assert_equal(Ring(queries, keys, options={"nearest": -2, "farthest": 11}).run(problem), expected)


def _operand(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _masks(size: int) -> dict[str, tuple[str, list[Tensor], list[Tensor], Tensor]]:
    """name -> program, rows, columns, the whole mask."""
    documents = torch.arange(size) // 7
    padding = torch.ones(2, 1, 1, size, dtype=torch.bool)
    padding[0, ..., -9:] = False
    arbitrary = _operand(1, 4, size, size) > 0.3
    arbitrary[:, :, 4] = False
    added = _operand(2, 1, size, size)
    added[:, :, 6] = -math.inf
    sunk = torch.zeros(1, 1, size, size, dtype=torch.float64)
    sunk[:, :, 8], sunk[..., 3:6] = -1e30, -1e30
    return {
        "documents": (
            "%2 = eq.Tensor(%0, %1)",
            [documents[:, None]],
            [documents[None]],
            documents[:, None] == documents,
        ),
        "padding": ("%0", [], [padding], padding),
        "arbitrary": ("%0", [arbitrary], [], arbitrary),
        "added": ("%0", [added], [], added),
        "rows below all": ("%0", [sunk], [], sunk),
    }


@pytest.mark.parametrize("name", _masks(10))
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("num_ranks", "circulates"), [(1, True), (4, True), (3, False)])
def test_masks(name: str, causal: bool, num_ranks: int, circulates: bool) -> None:
    """A program on each block; and a row without keys, of which the causal mask leaves more."""
    size = 31
    problem = Problem.random(size)
    program, rows, columns, mask = _masks(size)[name]
    if causal:
        seen = visible(size, size, 0, None)
        mask = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -math.inf)
    options = {"mask": program, **(CAUSAL if causal else {})}
    fields = {"rows": tuple(rows), "columns": tuple(columns), "options": options, "circulates": circulates}
    found, expected = ring(num_ranks, size, **fields).run(problem), one_device(problem, mask)
    if name != "rows below all":
        assert_equal(found, expected)
        return
    torch.testing.assert_close(found[0], expected[0], atol=1e-12, rtol=1e-12)
    # gradients by the definition: torch's fused kernel takes the probabilities of such rows for 1
    xs = [x.detach().requires_grad_() for x in (problem.query, problem.key, problem.value)]
    query, key, value = xs
    heads = [0, 0, 1, 1]
    scores = query @ key[:, heads].mT * 8**-0.5 + mask
    grads = torch.autograd.grad(scores.softmax(-1) @ value[:, heads], xs, problem.grad)
    assert_equal((found[0], found[1]), (expected[0], list(grads)))


def test_masks_are_computed_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several calls to a block, and keys that rows of the first call do not see but those of the next do."""
    from sptransform.ops.ring import plan

    monkeypatch.setattr(plan, "TILE", 4)
    monkeypatch.setattr(plan, "SPAN", 4)
    plan.plan_calls.cache_clear()
    problem = Problem.random(40)
    expected = one_device(problem, visible(40, 40, 0, 5))
    try:
        assert_equal(ring(2, 40, options={"nearest": 0, "farthest": 5}).run(problem), expected)
    finally:
        plan.plan_calls.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_give_no_nan(dtype: torch.dtype) -> None:
    problem = Problem.random(64, dtype=dtype)
    problem = Problem(problem.query * 50, problem.key, problem.value, problem.grad)
    out, grads = ring(4, 64, options=CAUSAL).run(problem)
    assert all(x.isfinite().all() for x in (out, *grads))
    assert {x.dtype for x in (out, *grads)} == {dtype}


def test_sizes_that_do_not_fit_are_refused() -> None:
    problem = Problem.random(12)
    with pytest.raises(ValueError, match="rank 0 has 12 queries, and owns 6"):
        torch.ops.sptransform.ring_attention(problem.query, problem.key, problem.value, [], [], queries="12/2")
    with pytest.raises(ValueError, match="not of one dtype"):
        torch.ops.sptransform.ring_attention(problem.query, problem.key.float(), problem.value, [], [])
