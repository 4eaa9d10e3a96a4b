"""Recurrences are found by what is computed, however it is written; what computes something else stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sptransform.passes.normalize.recognize_scans import RecognizeScans
from tests.support.graphs import after, nodes_of
from tests.support.state_space import segment_sums, tree_scan
from tests.support.tiers import tiered

PASS = (RecognizeScans(),)
aten, sp = torch.ops.aten, torch.ops.sptransform
A = -torch.rand(2, 3, 6, dtype=torch.float64)
X = torch.randn(2, 6, 3, 4, dtype=torch.float64)


def differences(a: Tensor) -> Tensor:
    """The decays from differences of running sums."""
    total = a.cumsum(-1)
    below = torch.arange(6)[:, None] >= torch.arange(6)
    return torch.where(below, total[..., :, None] - total[..., None, :], -torch.inf).exp()


def transposed(a: Tensor) -> Tensor:
    return segment_sums(a.float().double()).exp().transpose(1, 3)


SCANS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "segment sums": lambda a, x: torch.einsum("bhcz,bzhp->bchp", segment_sums(a).exp(), x),
    "the matrix second": lambda a, x: torch.einsum("bzhp,bhcz->bphc", x, segment_sums(a).exp()),
    "differences": lambda a, x: torch.einsum("bhcz,bzhp->bchp", differences(a), x),
    "other dims first": lambda a, x: torch.einsum("bzch,bzhp->bchp", transposed(a), x),
    "one batch": lambda a, x: torch.einsum("bhcz,bzhp->bchp", segment_sums(a[:1]).exp(), x[:1]),
}


def computed(a: Tensor, x: Tensor) -> Tensor:
    """The recurrence as it is defined, of ``[b, z, h, p]``."""
    rows = [x[:, 0]]
    for i in range(1, x.shape[1]):
        rows.append(a[:, :, i, None].exp() * rows[-1] + x[:, i])
    return torch.stack(rows, 1)


@pytest.mark.parametrize("name", tiered(SCANS, quick=["segment sums"]))
def test_a_matrix_of_decays(name: str) -> None:
    gm, _ = after(PASS, SCANS[name], A, X)
    assert len(nodes_of(gm, sp.scan.default)) == 1 and not nodes_of(gm, aten.einsum.default)
    torch.testing.assert_close(gm(A, X)[0], SCANS[name](A, X), rtol=1e-12, atol=1e-12)
    if name == "segment sums":
        torch.testing.assert_close(gm(A, X)[0], computed(A, X), rtol=1e-12, atol=1e-12)


def under_no_grad(a: Tensor) -> Tensor:
    """The value is that of decays, the gradient is not: half of it is lost."""
    with torch.no_grad():
        before = a.cumsum(-1)
    below = torch.arange(6)[:, None] >= torch.arange(6)
    return torch.where(below, a.cumsum(-1)[..., :, None] - before[..., None, :], -torch.inf).exp()


def some_heads(a: Tensor) -> Tensor:
    return segment_sums(a.repeat(1, 2, 1)).exp()[:, :3]


def without_the_last(a: Tensor) -> Tensor:
    """Almost: what leaves the last entry is forgotten."""
    return segment_sums(a).exp() * (torch.arange(6) != 5)


NO_SCANS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "weights of the other triangle": lambda a, x: torch.einsum("bhzc,bzhp->bchp", segment_sums(a).exp(), x),
    "sums, not decays": lambda a, x: torch.einsum("bhcz,bzhp->bchp", segment_sums(a).exp().log1p(), x),
    "a mask by data": lambda a, x: torch.einsum("bhcz,bzhp->bchp", segment_sums(a).exp() * (a[..., None] < -0.5), x),
    "an entry without decay": lambda a, x: torch.einsum("bhcz,bzhp->bchp", without_the_last(a), x),
    "whole numbers": lambda a, x: torch.einsum("bhcz,bzhp->bchp", segment_sums(a).exp().bool().to(x.dtype), x),
    "detached in part": lambda a, x: torch.einsum("bhcz,bzhp->bchp", under_no_grad(a), x),
    "some of the heads": lambda a, x: torch.einsum("bhcz,bzhp->bchp", some_heads(a), x),
    "many decays of one row": lambda a, x: torch.einsum("bhcz,bzhp->bchp", segment_sums(a).exp(), x[:1]),
    "another product": lambda a, x: torch.einsum("bhcz,bzhp->bhcp", torch.einsum("bhc,bhz->bhcz", a, a), x),
}


@pytest.mark.parametrize("name", tiered(NO_SCANS, quick=["an entry without decay"]))
def test_other_products_stay(name: str) -> None:
    a = A.clone().requires_grad_()
    gm, _ = after(PASS, NO_SCANS[name], a, X)
    assert not nodes_of(gm, sp.scan.default)
    assert torch.equal(gm(a, X)[0], NO_SCANS[name](a, X))


@pytest.mark.slow
def test_a_far_band_of_decays_stays() -> None:
    """Decays over many rows are small where all are less than 1, but they need not be."""
    a, x = torch.zeros(1, 1, 260, dtype=torch.float64), torch.randn(1, 260, 1, 1, dtype=torch.float64)

    def function(a: Tensor, x: Tensor) -> Tensor:
        rows = torch.arange(260)
        near = rows[:, None] - rows < 200
        return torch.einsum("bhcz,bzhp->bchp", segment_sums(a).exp() * near, x)

    gm, _ = after(PASS, function, a, x)
    assert not nodes_of(gm, sp.scan.default)


@pytest.mark.parametrize("length", tiered([2, 3, 6, 7, 8], quick=[7]))
def test_a_tree_of_products(length: int) -> None:
    a, x = A.movedim(-1, 0).repeat(2, 1, 1)[:length], torch.randn(length, 2, 3, dtype=torch.float64)

    def function(a: Tensor, x: Tensor) -> Tensor:
        return tree_scan(a.exp(), x)[1]

    gm, _ = after(PASS, function, a, x)
    assert len(nodes_of(gm, sp.scan.default)) == 1 and not nodes_of(gm, aten.stack.default)
    torch.testing.assert_close(gm(a, x)[0], function(a, x), rtol=1e-12, atol=1e-12)


def channels_turned(a: Tensor, x: Tensor) -> Tensor:
    return tree_scan(a.exp(), x, lambda row: row.flip(-1))[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "function",
    [lambda a, x: tree_scan(a, x)[1], lambda a, x: tree_scan(a.exp(), x)[0] + x, channels_turned],
    ids=["factors of any sign", "products alone", "channels turned"],
)
def test_other_trees_stay(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    a, x = A.movedim(-1, 0), torch.randn(6, 2, 3, dtype=torch.float64)
    gm, _ = after(PASS, function, a, x)
    assert not nodes_of(gm, sp.scan.default)
    assert torch.equal(gm(a, x)[0], function(a, x))
