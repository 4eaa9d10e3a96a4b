"""Gradients of the operands of a mask, on N ranks, against their definition on one device, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sptransform.graph import dataflow
from sptransform.ops.mask_program import block_mask
from sptransform.ops.ring import plan, trace_steps
from sptransform.ops.ring.kernels import reference
from sptransform.sharding.partition import Partition
from tests.ops.ring.ranks import Problem, Ring, visible
from tests.ops.ring.test_softcap_and_sinks import Largest

sp = torch.ops.sptransform

HEADS, SIZE, CAP = 4, 31, 0.9
LOWEST = torch.finfo(torch.float64).min
POSITIONS = torch.arange(SIZE)


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@dataclass(frozen=True)
class Learned:
    """A mask program and its operands; those of floating point are trained."""

    program: str
    rows: tuple[Tensor, ...] = ()
    columns: tuple[Tensor, ...] = ()
    tables: tuple[Tensor, ...] = ()

    @property
    def operands(self) -> list[Tensor]:
        return [*self.rows, *self.columns, *self.tables]

    @property
    def trained(self) -> tuple[int, ...]:
        return tuple(i for i, x in enumerate(self.operands) if x.is_floating_point())

    def of(self, operands: list[Tensor]) -> Learned:
        rows, columns = len(self.rows), len(self.columns)
        return replace(
            self,
            rows=tuple(operands[:rows]),
            columns=tuple(operands[rows : rows + columns]),
            tables=tuple(operands[rows + columns :]),
        )

    @property
    def whole(self) -> Tensor:
        return block_mask(self.program, self.rows, self.columns, 0, SIZE, slice(0, SIZE), self.tables)


# distance + 31, so that the table has an entry for each
_DISTANCE = "%{0} = sub.Tensor(%0, %1); %{1} = add.Tensor(%{0}, 31)"
LOW = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.float64)
LOW[:, :, 8], LOW[..., 3:6], LOW[:, :, 9] = -1e30, -1e30, LOWEST
SEEN = torch.rand(1, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) > 0.3
SEEN[:, :, 4] = False
DOCUMENTS = torch.stack([POSITIONS // 7, POSITIONS // 11])[:, None, None]

MASKS = {
    "a table for each head": Learned(
        _DISTANCE.format(3, 4) + "; %5 = lookup(%2, %4)",
        (POSITIONS[:, None],),
        (POSITIONS[None],),
        (numbers(HEADS, 2 * SIZE),),
    ),
    "everything": Learned(
        _DISTANCE.format(7, 8).replace("%1)", "%3)", 1)
        + "; %9 = lookup(%5, %8); %10 = lookup(%6, %8); %11 = mul.Tensor(%9, %1); %12 = add.Tensor(%11, %10); "
        "%13 = sub.Tensor(%12, %4); %14 = mul.Tensor(%13, %2)",
        (POSITIONS[:, None], numbers(2, 1, SIZE, 1), numbers(HEADS, SIZE, 1)),
        (POSITIONS[None], numbers(2, 1, 1, SIZE)),
        (numbers(HEADS, 2 * SIZE), numbers(1, 2 * SIZE)),
    ),
    "slopes": Learned(
        "%3 = sub.Tensor(%0, %2); %4 = mul.Tensor(%1, %3)", (POSITIONS[:, None],), (numbers(HEADS, 1, 1), POSITIONS)
    ),
    "a number": Learned("%2 = mul.Tensor(%0, %1)", (POSITIONS[:, None] % 3,), (numbers(),)),
    "all of it": Learned("%0", (numbers(2, HEADS, SIZE, SIZE),)),
    "rows that see nothing": Learned(
        "%3 = add.Tensor(%1, %2); %4 = masked_fill.Scalar(%3, %0, -inf)",
        (~SEEN, numbers(2, HEADS, SIZE, 1)),
        (numbers(HEADS, 1, SIZE),),
    ),
    "documents of each row of the batch": Learned(
        "%3 = eq.Tensor(%0, %1); %4 = logical_not(%3); %5 = masked_fill.Scalar(%2, %4, -inf)",
        (DOCUMENTS.mT,),
        (DOCUMENTS, numbers(HEADS, 1, SIZE)),
    ),
    "rows of low numbers": Learned(
        "%5 = sub.Tensor(%0, %2); %6 = add.Tensor(%5, 31); %7 = lookup(%4, %6); %8 = mul.Tensor(%7, %3); "
        "%9 = add.Tensor(%8, %1)",
        (POSITIONS[:, None], LOW),
        (POSITIONS[None], numbers(2, 1, 1, SIZE)),
        (numbers(HEADS, 2 * SIZE),),
    ),
}


def defined(
    problem: Problem, learned: Learned, seen: Tensor, *, softcap: float = 0.0, kept: Tensor | float = 1.0,
    heads: tuple[int, ...] = (0, 0, 1, 1),
) -> list[Tensor]:  # fmt: skip
    """Result and gradients, of query, key, value and the trained operands."""
    xs = [x.detach().requires_grad_() for x in (problem.query, problem.key, problem.value)]
    operands = [x.detach().requires_grad_(i in learned.trained) for i, x in enumerate(learned.operands)]
    scores = xs[0] @ xs[1][:, list(heads)].mT * 8**-0.5
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + learned.of(operands).whole.masked_fill(~seen, -math.inf)
    out = (torch.ops.aten._safe_softmax(scores, -1) * kept) @ xs[2][:, list(heads)]
    wanted = [*xs, *(operands[i] for i in learned.trained)]
    return [out.detach(), *torch.autograd.grad(out, wanted, problem.grad)]


def ring_of(learned: Learned, num_ranks: int, layout: str = "zigzag", circulates: bool = True, **options: Any) -> Ring:
    partition = getattr(Partition, layout)(SIZE, num_ranks)
    return Ring(
        partition,
        partition,
        learned.rows,
        learned.columns,
        {"mask": learned.program, **options},
        circulates,
        tables=learned.tables,
        trained=learned.trained,
    )


def found_by(ring: Ring, problem: Problem, seed: int = 5) -> list[Tensor]:
    torch.manual_seed(seed)
    out, grads = ring.run(problem)
    torch.manual_seed(seed)
    return [out, *grads, *ring.of_operands(problem)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        scale = max(float(y.abs().max()), 1.0)  # a sum over all positions has large terms
        torch.testing.assert_close(x, y, atol=1e-12 * scale, rtol=1e-12, msg=lambda text, i=i: f"{i}: {text}")
        assert i == 0 or y.count_nonzero()


@pytest.mark.covering(ways=2)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("nearest", "farthest"), [(0, None), (0, 6), (None, None)])
@pytest.mark.parametrize(("num_ranks", "layout"), [(1, "zigzag"), (3, "zigzag"), (4, "contiguous")])
@pytest.mark.parametrize("circulates", [True, False])
@pytest.mark.parametrize("tile", [5, 512])
def test_masks(
    name: str, nearest: int | None, farthest: int | None, num_ranks: int, layout: str, circulates: bool, tile: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Lengths that the ranks do not share evenly, in one tile of rows and in several."""
    monkeypatch.setattr(plan, "TILE", tile)
    monkeypatch.setattr(plan, "SPAN", tile)
    plan.plan_calls.cache_clear()
    learned, problem = MASKS[name], Problem.random(SIZE)
    ring = ring_of(learned, num_ranks, layout, circulates, nearest=nearest, farthest=farthest)
    found = found_by(ring, problem)
    plan.plan_calls.cache_clear()
    assert_same(found, defined(problem, learned, visible(SIZE, SIZE, nearest, farthest)))


@pytest.mark.parametrize("heads", [(0, 1, 1, 1), (1, 0, 0, 1)], ids=str)
@pytest.mark.parametrize("name", ["everything", "rows of low numbers"])
def test_heads_and_softcap(name: str, heads: tuple[int, ...]) -> None:
    """Tables are those of query heads, in their order; the bias comes after the cap."""
    learned, problem = MASKS[name], Problem.random(SIZE)
    ring = ring_of(learned, 2, nearest=0, softcap=CAP, key_head_of=list(heads))
    expected = defined(problem, learned, visible(SIZE, SIZE, 0, None), softcap=CAP, heads=heads)
    assert_same(found_by(ring, problem), expected)


@pytest.mark.parametrize(
    "name", ["everything", "rows that see nothing", "rows of low numbers", "documents of each row of the batch"]
)
def test_dropout(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is dropped is read off the forward of values that are unit vectors."""
    monkeypatch.setattr(reference, "TILE", 4)
    learned, problem, p = MASKS[name], Problem.random(SIZE), 0.4
    ring = ring_of(learned, 3, nearest=0, dropout_p=p)
    unit = torch.eye(SIZE, dtype=torch.float64).expand(2, 2, SIZE, SIZE)
    torch.manual_seed(5)
    kept = torch.zeros(2, HEADS, SIZE, SIZE, dtype=torch.float64)
    for rank, (out, *_) in ring.forward(Problem(problem.query, problem.key, unit, problem.grad)).items():
        at = 0
        for lo, hi in ring.queries.owned[rank]:
            kept[:, :, lo:hi] = out[:, :, at : at + hi - lo]
            at += hi - lo
    seen = visible(SIZE, SIZE, 0, None)
    expected = defined(problem, learned, seen, kept=(kept != 0).double() / (1 - p))
    assert_same(found_by(ring, problem), expected)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("name", ["everything", "slopes", "all of it"])
def test_the_op_has_the_gradients_of_its_definition(name: str, with_sinks: bool) -> None:
    """Also of some operands alone, and beside sinks."""
    learned, problem = MASKS[name], Problem.random(SIZE)
    expected = defined(problem, learned, visible(SIZE, SIZE, 0, None))
    for trained in (learned.trained, learned.trained[:1], learned.trained[-1:]):
        xs = [x.detach().requires_grad_() for x in (problem.query, problem.key, problem.value)]
        operands = [x.detach().requires_grad_(i in trained) for i, x in enumerate(learned.operands)]
        own = learned.of(operands)
        # a sink that changes nothing
        sinks = torch.full([HEADS], -math.inf, dtype=torch.float64, requires_grad=True) if with_sinks else None
        out, *_ = sp.ring_attention(*xs, [*own.rows], [*own.columns], sinks, [*own.tables], mask=own.program, nearest=0)
        wanted = [*xs, *(operands[i] for i in trained)]
        grads = torch.autograd.grad(out, [*wanted, *([sinks] if with_sinks else [])], problem.grad)
        at = [4 + learned.trained.index(i) for i in trained]
        assert_same([out.detach(), *grads[: len(wanted)]], [*expected[:4], *(expected[i] for i in at)])


def test_opcheck() -> None:
    for name in ("everything", "all of it"):
        learned, problem = MASKS[name], Problem.random(SIZE)
        xs = [x.detach().requires_grad_() for x in (problem.query, problem.key, problem.value)]
        own = learned.of([x.detach().requires_grad_(i in learned.trained) for i, x in enumerate(learned.operands)])
        arguments = (*xs, [*own.rows], [*own.columns], None, [*own.tables])
        torch.library.opcheck(sp.ring_attention.default, arguments, {"mask": own.program, "nearest": 0})
        plain = [x.detach() for x in xs]
        result = sp.ring_attention(*plain, *arguments[3:5], None, arguments[6], mask=own.program)
        backward = (
            result[0],
            *plain,
            [*learned.rows],
            [*learned.columns],
            *(x.detach() for x in result),
            [*learned.tables],
        )
        options = {"mask": own.program, "trained": list(learned.trained)}
        torch.library.opcheck(sp.ring_attention_backward.default, tuple(
            x.detach() if isinstance(x, Tensor) else x for x in backward
        ), options)  # fmt: skip
    query, mask = problem.query, numbers(HEADS, SIZE, SIZE)
    out, lse = sp.attention_block(query, problem.key, problem.value, mask, False)
    arguments = (out, query, problem.key, problem.value, mask, out, lse, False)
    torch.library.opcheck(sp.attention_block_backward_with_mask.default, arguments)
    torch.library.opcheck(sp.add_to_operand.default, (mask, mask[:, 2:5, :7], 3, [0, 4, 9, 12]))
    torch.library.opcheck(sp.lookup.default, (numbers(HEADS, 6), torch.randint(6, (2, 1, 4, 4))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_come_in_the_dtype_of_their_operands(dtype: torch.dtype) -> None:
    """They are summed in float32."""
    learned, problem = MASKS["a table for each head"], Problem.random(SIZE)
    exact = defined(problem, learned, visible(SIZE, SIZE, 0, None))
    own = problem.to(dtype)
    xs = [x.requires_grad_() for x in (own.query, own.key, own.value)]
    table = learned.tables[0].to(dtype).requires_grad_()
    out, *_ = sp.ring_attention(
        *xs, [*learned.rows], [*learned.columns], None, [table], mask=learned.program, nearest=0
    )
    (grad,) = torch.autograd.grad(out, [table], own.grad)
    assert grad.dtype == dtype
    assert float((grad.double() - exact[4]).norm() / exact[4].norm()) < (2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_no_tensor_has_all_queries_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    tile, size = 4, 60
    learned = Learned(
        "%3 = sub.Tensor(%0, %1); %4 = add.Tensor(%3, 60); %5 = lookup(%2, %4)",
        (torch.arange(size)[:, None],),
        (torch.arange(size)[None],),
        (numbers(HEADS, 2 * size),),
    )
    problem = Problem.random(size, batch=1, dim=2)
    partition = Partition.contiguous(size, 1)
    ring = Ring(
        partition, partition, learned.rows, learned.columns, {"mask": learned.program}, False,
        tables=learned.tables, trained=learned.trained,
    )  # fmt: skip
    monkeypatch.setattr(plan, "TILE", tile)
    monkeypatch.setattr(plan, "SPAN", tile)
    plan.plan_calls.cache_clear()
    with Largest() as largest:
        ring.backward(problem, ring.forward(problem))
    plan.plan_calls.cache_clear()
    assert largest.num <= HEADS * tile * size < size * size


def test_expanded() -> None:
    """As nodes, the backward is functional, and computes what the op computes."""
    learned, problem = MASKS["everything"], Problem.random(SIZE)
    ring = ring_of(learned, 1, circulates=False, nearest=0)
    result = ring.forward(problem)[0]
    arguments = (*ring.backward_arguments(problem, 0, result), [*ring.tables])
    options = {**ring.keywords, "group_name": "", "trained": list(ring.trained)}
    gm = trace_steps("ring_attention_backward", 0, arguments, options)
    assert not [node for node in gm.graph.nodes if dataflow.writes(node)]
    tensors = torch.utils._pytree.tree_leaves(arguments)
    expected = sp.ring_attention_backward(*arguments, **options)
    for x, y in zip(gm(*tensors), expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-12)
