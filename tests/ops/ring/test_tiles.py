"""Attention under masks that are computed a tile at a time, against the same in one tile, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sptransform.ops.ring import blocks, plan
from sptransform.sharding.partition import Partition
from tests.ops.ring.ranks import Problem, Ring, assert_equal

SIZE, HEADS = 31, 4
LOWEST = torch.finfo(torch.float64).min


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def _seen() -> Tensor:
    """Some rows see no key of some tiles, and some none at all."""
    seen = numbers(1, HEADS, SIZE, SIZE) > 0.3
    seen[:, :, 4], seen[..., 5:9, :12] = False, False
    return seen


def _added(lowest: float) -> Tensor:
    """Keys are hidden by a number; row 8 has only such keys, and row 9 keys that are hidden by two numbers."""
    added = numbers(2, 1, SIZE, SIZE)
    added[:, :, 8:10] = lowest
    added[:, :, 9, 7:13] = lowest / 2
    added[..., 3:6] = lowest
    return added


MASKS = {
    "seen": _seen(),
    "added": numbers(2, 1, SIZE, SIZE).masked_fill(~_seen(), -math.inf),
    "low": _added(-1e30),
    "lowest": _added(LOWEST),
    "large": _added(-1e9),
}
LIMITS: dict[str, dict[str, int]] = {
    "no band": {},
    "causal": {"nearest": 0},
    "window": {"nearest": 0, "farthest": 9},
    "both sides": {"nearest": -6, "farthest": 6},
}


@pytest.fixture(autouse=True)
def forget_plans() -> Iterator[None]:
    plan.plan_calls.cache_clear()
    yield
    plan.plan_calls.cache_clear()


def tiled(monkeypatch: pytest.MonkeyPatch, rows: int, span: int) -> None:
    monkeypatch.setattr(plan, "TILE", rows)
    monkeypatch.setattr(plan, "SPAN", span)
    plan.plan_calls.cache_clear()


def shared(num_ranks: int, mask: Tensor | None = None, circulates: bool = True, **options: Any) -> Ring:
    partition = Partition.zigzag(SIZE, num_ranks)
    fields: dict[str, Any] = {}
    for name in ("trained", "sinks"):
        if name in options:
            fields[name] = options.pop(name)
    rows = () if mask is None else (mask,)
    return Ring(partition, partition, rows, (), options | ({"mask": "%0"} if rows else {}), circulates, **fields)


@pytest.mark.covering(ways=2)
@pytest.mark.parametrize("name", ["none", *(name for name in MASKS if name != "large")])
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize(("num_ranks", "circulates"), [(1, False), (1, True), (3, True), (3, False)])
@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks", "explicit"])
def test_the_same_in_tiles(
    name: str, limits: str, num_ranks: int, circulates: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = dict(LIMITS[limits])
    if kind == "softcap":
        options["softcap"] = 0.9
    if kind == "sinks":
        options["sinks"] = numbers(HEADS)
    if kind == "explicit":
        options["explicit"] = True
    ring, problem = shared(num_ranks, MASKS.get(name), circulates, **options), Problem.random(SIZE)
    whole = ring.run(problem)
    tiled(monkeypatch, 4, 5)
    assert_equal(ring.run(problem), whole)


@pytest.mark.parametrize("circulates", [False, True])
@pytest.mark.parametrize("name", ["added", "low", "lowest"])
def test_the_same_gradient_of_a_mask(name: str, circulates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ring, problem = shared(1, MASKS[name], circulates, nearest=0, trained=(0,)), Problem.random(SIZE)
    (whole,) = ring.of_operands(problem)
    tiled(monkeypatch, 4, 5)
    torch.testing.assert_close(ring.of_operands(problem)[0], whole, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("explicit", [False, True])
def test_keys_hidden_by_a_large_number(explicit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside it ``lse`` has no digits for a merge. Only what is explicit has exact gradients too."""
    ring, problem = shared(1, MASKS["large"], False, explicit=explicit), Problem.random(SIZE)
    whole = ring.run(problem)
    tiled(monkeypatch, 4, 5)
    found = ring.run(problem)
    if explicit:
        assert_equal(found, whole)
    torch.testing.assert_close(found[0], whole[0], atol=1e-12, rtol=1e-12)


def test_the_same_is_dropped_in_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is dropped is read off the forward of values that are unit vectors; no two tiles drop alike."""
    tiled(monkeypatch, 4, 5)
    seen, p = numbers(SIZE) > -1.0, 0.4
    ring = shared(1, seen.expand(1, 1, SIZE, SIZE), False, nearest=0, dropout_p=p)
    problem = Problem.random(SIZE)
    unit = torch.eye(SIZE, dtype=torch.float64).expand(2, 2, SIZE, SIZE)
    torch.manual_seed(5)
    kept = ring.forward(Problem(problem.query, problem.key, unit, problem.grad))[0][0] != 0
    xs = [x.detach().requires_grad_() for x in (problem.query, problem.key, problem.value)]
    hidden = ~(seen & torch.ones(SIZE, SIZE, dtype=torch.bool).tril())
    scores = (xs[0] @ xs[1][:, [0, 0, 1, 1]].mT * 8**-0.5).masked_fill(hidden, -math.inf)
    out = (torch.ops.aten._safe_softmax(scores, -1) * kept / (1 - p)) @ xs[2][:, [0, 0, 1, 1]]
    torch.manual_seed(5)
    assert_equal(ring.run(problem), (out.detach(), list(torch.autograd.grad(out, xs, problem.grad))))
    tiles = [kept[0, 0, i : i + 4, j : j + 5] for i in range(16, 28, 4) for j in (0, 5, 10)]
    assert len({tuple(x.flatten().tolist()) for x in tiles}) == len(tiles)


@pytest.mark.parametrize("explicit", [False, True])
def test_no_mask_grows_with_the_keys(explicit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels get has as many entries as a tile, for every number of keys."""
    tiled(monkeypatch, 8, 16)
    made: list[int] = []

    def noted(mask: Tensor, *arguments: Any) -> Any:
        made.append(mask.numel())
        return real(mask, *arguments)

    real = blocks._bias
    monkeypatch.setattr(blocks, "_bias", noted)
    largest = []
    for num_keys in (32, 256):
        seen = numbers(1, 1, 16, num_keys) > 0
        mask = seen.double() if explicit else seen
        made.clear()
        partition = Partition.contiguous(16, 1)
        ring = Ring(partition, partition, (mask,), (), {"mask": "%0", "explicit": explicit, "queries": ""}, False)
        ring.run(Problem.random(16, num_keys, dim=2))
        largest.append(max(made))
    assert largest == [8 * 16 if not explicit else 4 * 32, 8 * 16 if not explicit else 256]
