"""Many pieces in one call of a kernel, against a loop over them. The kernels are stand-ins, see
`tests/support/cuda_stand_ins.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sptransform.ops.ring.kernels.interface import Case
from sptransform.ops.ring.kernels.reference import OPEN
from sptransform.ops.ring.kernels.table import choose
from sptransform.ops.ring.kernels.varlen import flash, flash_backward, rows_of
from tests.ops.ring.ranks import Problem
from tests.support.cuda_stand_ins import Calls, on_cpu, seen

Piece = tuple[int, int]
SIZES = [(6, 4), (10, 2)]  # rows and heads, of queries and of keys

PIECES: dict[str, tuple[list[Piece], list[Piece]]] = {
    "documents": ([(0, 3), (3, 4), (4, 11)], [(0, 3), (3, 4), (4, 11)]),
    "earlier keys": ([(0, 2), (4, 9)], [(3, 9), (12, 17)]),
    "out of order, twice": ([(6, 9), (0, 2), (6, 9)], [(10, 14), (0, 5), (2, 6)]),
    "of two sequences": ([(2, 7), (11, 14), (15, 22)], [(1, 8), (18, 24), (24, 33)]),
    "rows that see nothing": ([(0, 6), (7, 9)], [(3, 5), (5, 9)]),
    "one row each": ([(0, 1), (4, 5)], [(0, 4), (7, 8)]),
}


@pytest.fixture
def calls(kernel: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    with on_cpu(kernel, monkeypatch) as calls:
        yield calls


def one_piece(
    problem: Problem, whole: tuple[Tensor, Tensor], queries: Piece, keys: Piece, causal: bool, softcap: float
) -> list[Tensor]:  # fmt: skip
    """out, lse and the gradients of one piece, by the definition; ``whole`` is out and lse over more keys."""
    query, grad, out = (rows_of(x, [queries]).transpose(0, 1)[None] for x in (problem.query, problem.grad, whole[0]))
    key, value = (rows_of(x, [keys]).transpose(0, 1)[None] for x in (problem.key, problem.value))
    lse = whole[1].transpose(0, 1).flatten(1)[None, :, slice(*queries)]
    lse = lse.masked_fill(lse.isinf(), 0)
    shown = seen(query.shape[2], key.shape[2], causal, -1, -1)
    bias = torch.zeros(shown.shape).double().masked_fill(~shown, -torch.inf)[None, None]
    found = OPEN.forward(query, key, value, bias, False, 0.4, softcap)
    grads = OPEN.backward(grad, query, key, value, bias, out, lse, False, 0.4, softcap)
    return [found[0][0].transpose(0, 1), found[1][0], *(x[0].transpose(0, 1) for x in grads)]


def whole_results(problem: Problem) -> tuple[Tensor, Tensor]:
    """Some out and lse, as if over more keys."""
    generator = torch.Generator().manual_seed(3)
    out = torch.randn(problem.grad.shape, generator=generator, dtype=torch.float64)
    return out, 3 + torch.rand(out.shape[:3], generator=generator, dtype=torch.float64)


def check(
    kernel: str, name: str, causal: bool, softcap: float = 0.0, layout: str = "heads first"
) -> None:
    problem, (queries, keys) = Problem.random(11, 17), PIECES[name]
    if layout == "heads inside":
        problem = Problem(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in vars(problem).values()))
    whole, extra = whole_results(problem), {"softcap": softcap} if softcap else {}
    if causal and name == "rows that see nothing":
        whole[1][:1, :, :4] = -torch.inf
    case = Case.of(problem.query, problem.value, masked=False, explicit=False, softcap=softcap)
    chosen = choose(case)
    assert chosen.name == kernel and chosen.varlen is not None
    xs, options = (problem.query, problem.key, problem.value), (queries, keys, causal, 0.4)
    found = [*chosen.varlen.forward(*xs, *options, **extra)]
    found += chosen.varlen.backward(problem.grad, *xs, *whole, *options, **extra)
    pairs = zip(queries, keys, strict=True)
    parts = zip(*(one_piece(problem, whole, *pair, causal, softcap) for pair in pairs), strict=True)
    for x, of_pieces, dim in zip(found, parts, (0, 1, 0, 0, 0), strict=True):
        torch.testing.assert_close(x, torch.cat(of_pieces, dim), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kernel", ["flash-attn", "CUDA flash"])
@pytest.mark.parametrize("name", PIECES)
@pytest.mark.parametrize("causal", [True, False])
def test_pieces(kernel: str, name: str, causal: bool, calls: Calls) -> None:
    """In one call forward and one backward."""
    check(kernel, name, causal)
    assert len(calls) == 2


@pytest.mark.parametrize("kernel", ["flash-attn"])
def test_options(kernel: str, calls: Calls) -> None:
    check(kernel, "documents", True, softcap=0.7)
    check(kernel, "earlier keys", False, layout="heads inside")


def test_pieces_that_adjoin_are_not_copied() -> None:
    x = torch.randn(2, 8, 4, 16).transpose(1, 2)
    rows = rows_of(x, [(3, 5), (5, 12), (12, 13)])
    assert rows.shape == (10, 4, 16) and rows.data_ptr() == x[0, :, 3].data_ptr()


@pytest.mark.parametrize("kernel", ["CUDA flash"])
@pytest.mark.parametrize("queries", [[(0, 0), (1, 3)], [(0, 3)]])
def test_pieces_without_rows_are_refused(kernel: str, queries: list[Piece], calls: Calls) -> None:
    x = torch.randn(1, 1, 4, 8).double()
    varlen = choose(Case.of(x, x, masked=False, explicit=False, softcap=0.0)).varlen
    with pytest.raises(ValueError, match="not pairs of pieces"):
        varlen.forward(x, x, x, queries, [(0, 2), (2, 4)], False, 1.0)


def test_shapes_of_the_op() -> None:
    """Of torch's op on a GPU, of which only fakes are needed."""
    with FakeTensorMode():
        query, key = (torch.empty(2, size, heads, 16, device="cuda").half().transpose(1, 2) for size, heads in SIZES)
        out, lse = flash(query, key, key, [(0, 3), (4, 6)], [(0, 8), (8, 9)], True, 0.5)
        whole = query, torch.empty(2, 4, 6, device="cuda").double()
        grads = flash_backward(query, query, key, key, *whole, [(0, 3), (4, 6)], [(0, 8), (8, 9)], True, 0.5)
    assert (out.shape, lse.shape) == ((5, 4, 16), (4, 5))
    assert [x.shape for x in grads] == [(5, 4, 16), (9, 2, 16), (9, 2, 16)]


def test_other_kernels_take_no_pieces() -> None:
    x = torch.randn(1, 1, 4, 8)
    assert choose(Case.of(x, x, masked=False, explicit=False, softcap=0.0)).varlen is None
