"""Mask programs: their text, what they may hold, and that a block of the mask is the block of the whole mask."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from sptransform.ops.mask_program import MaskProgram, Ref, Step, block_mask, is_elementwise, parse

aten = torch.ops.aten

BATCH, HEADS, QUERIES, KEYS = 2, 3, 5, 7

TEXTS = [
    "%0",
    "%2 = le.Tensor(%1, %0)",
    "%3 = le.Tensor(%1, %0); %4 = __and__.Tensor(%3, %2); %5 = bitwise_not(%4)",
    "%1 = masked_fill.Scalar(%0, %0, -inf)",
    "%1 = to.dtype(%0, bfloat16); %2 = clamp(%1, None, 0.5)",
    "%2 = add.Tensor(%0, %1, alpha=-2); %3 = div.Tensor_mode(%2, 4, rounding_mode='floor')",
    "%1 = nan_to_num(%0, nan, inf, -1e-08)",
    "%1 = gelu(%0, approximate='tanh'); %2 = logical_or(%1, %0)",
]


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_read_is_written_alike(text: str) -> None:
    assert str(parse(text)) == text


def test_numbers_are_read_exactly() -> None:
    step = Step(aten.masked_fill.Scalar, (Ref(0), Ref(1), torch.finfo(torch.float64).min))
    program = MaskProgram(2, (step, Step(aten.mul.Tensor, (Ref(2), 0.1)), Step(aten.eq.Scalar, (Ref(3), True))))
    assert parse(str(program)) == program
    assert math.isnan(parse("%1 = nan_to_num(%0, nan)").steps[0].args[1])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "%1",
        "%0; %1",
        "le(%0",
        "%1 = le.Tensor(%0)(%0)",
        "%1 = le.Nothing(%0, %0)",
        "%1 = nothing(%0)",
        "%2 = neg(%0); %4 = neg(%2)",
        "%1 = neg(%0); %0",
        "%1 = neg(x)",
        "%1 = cumsum(%0, 0)",  # reads other entries
        "%1 = bernoulli.p(%0, 0.5)",  # and the mask of the backward would be another
        "%1 = dropout(%0, 0.5, True)",
        "%1 = add_.Tensor(%0, 1)",
        "%1 = tril(%0)",
        "%1 = expand(%0, [4])",
    ],
)
def test_what_is_no_program_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a mask program"):
        parse(text)


def test_parsed_once() -> None:
    assert parse(TEXTS[2]) is parse(TEXTS[2])


def test_ops_of_others_are_not_elementwise() -> None:
    assert not is_elementwise(torch.ops.sptransform.attention.default)
    assert not is_elementwise(torch.add)
    assert not is_elementwise(aten.frexp.Tensor)  # two results


def test_operands_are_cut_where_they_have_the_dimension() -> None:
    rows = [torch.arange(QUERIES)[:, None], torch.arange(QUERIES * KEYS).view(QUERIES, KEYS)]
    columns = [torch.arange(KEYS), torch.tensor(100), torch.ones(BATCH, 1, 1, 1, dtype=torch.long)]
    text = (
        "%5 = add.Tensor(%0, %1, alpha=1000); %6 = add.Tensor(%5, %2, alpha=1000000);"
        "%7 = add.Tensor(%6, %3); %8 = add.Tensor(%7, %4)"
    )
    whole = rows[0] + 1000 * rows[1] + 1000000 * columns[0] + columns[1] + columns[2]
    indices = torch.tensor([6, 0, 3])
    torch.testing.assert_close(block_mask(text, rows, columns, 1, 4, indices), whole[..., 1:4, :][..., indices])
    torch.testing.assert_close(block_mask(text, rows, columns, 4, 5, slice(2, 4)), whole[..., 4:5, 2:4])
    torch.testing.assert_close(block_mask(text, rows, columns, 0, QUERIES, slice(0, KEYS)), whole)


def test_a_mask_has_two_dimensions_at_least() -> None:
    keys = torch.arange(KEYS)
    assert block_mask("%0", [], [keys > 2], 0, 1, slice(2, 5)).tolist() == [[False, True, True]]
    assert block_mask("%0", [], [torch.tensor(True)], 0, 1, slice(0, 3)).tolist() == [[True]]


def test_a_rank_with_one_query() -> None:
    row = torch.tensor([[4]])
    assert block_mask("%2 = le.Tensor(%1, %0)", [row], [torch.arange(6)], 0, 1, slice(3, 6)).tolist() == [
        [True, True, False]
    ]


def test_make_fx_sees_the_steps() -> None:
    def run(row: torch.Tensor, column: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return block_mask("%2 = le.Tensor(%1, %0)", [row], [column], 1, 3, positions)

    inputs = torch.arange(4)[:, None], torch.arange(4), torch.tensor([2, 0])
    graph = make_fx(run)(*inputs)
    assert aten.le.Tensor in [node.target for node in graph.graph.nodes]
    torch.testing.assert_close(graph(*inputs), run(*inputs))


# how operands of each kind may be shaped; the key dimension of rows is 1 or whole
_ROWS = [(BATCH, 1, QUERIES, 1), (QUERIES, 1), (1, HEADS, QUERIES, 1), (BATCH, 1, QUERIES, KEYS)]
_COLUMNS = [(KEYS,), (BATCH, 1, 1, KEYS), (1, KEYS), (), (HEADS, 1, 1), (BATCH, HEADS, 1, KEYS)]
_BINARY = [aten.le.Tensor, aten.eq.Tensor, aten.sub.Tensor, aten.logical_and.default, aten.maximum.default]
_BINARY += [aten.__or__.Tensor, aten.mul.Tensor]
_UNARY = [(aten.abs.default, ()), (aten.logical_not.default, ()), (aten.le.Scalar, (2,)), (aten.clamp.default, (0, 3))]


@st.composite
def programs(draw: st.DrawFn) -> tuple[str, list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))

    def operand(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(-2, 5, shape, generator=generator)

    rows = [operand(shape) for shape in draw(st.lists(st.sampled_from(_ROWS), max_size=3))]
    columns = [operand(shape) for shape in draw(st.lists(st.sampled_from(_COLUMNS), min_size=1, max_size=3))]
    num = len(rows) + len(columns)

    def numbers(index: int) -> st.SearchStrategy[Ref]:
        return st.sampled_from([*range(num), *range(num + 1, index, 2)]).map(Ref)

    steps: list[Step] = []
    for index in range(num, num + 2 * draw(st.integers(1, 5)), 2):
        args: tuple[Any, ...] = (draw(numbers(index)),)
        if draw(st.booleans()):
            target = draw(st.sampled_from(_BINARY))
            args = (*args, draw(numbers(index)))
        else:
            target, more = draw(st.sampled_from(_UNARY))
            args = (*args, *more)
        # as numbers, since not every op takes booleans
        steps += [Step(target, args), Step(aten.to.dtype, (Ref(index), torch.int64))]
    return str(MaskProgram(num, tuple(steps))), rows, columns


@settings(max_examples=150, deadline=None, database=None)
@given(programs(), st.data())
def test_a_block_is_the_block_of_the_whole(made: Any, data: st.DataObject) -> None:
    text, rows, columns = made
    whole = parse(text).run([*rows, *columns]).expand(BATCH, HEADS, QUERIES, KEYS)
    start = data.draw(st.integers(0, QUERIES - 1))
    stop = data.draw(st.integers(start + 1, QUERIES))
    positions = data.draw(st.lists(st.integers(0, KEYS - 1), min_size=1, max_size=KEYS).map(torch.tensor))
    found = block_mask(text, rows, columns, start, stop, positions)
    expected = whole[:, :, start:stop][..., positions]
    assert torch.equal(found.expand(expected.shape), expected)
