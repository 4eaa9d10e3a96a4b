"""Formulas of tensors that depend on no input: they give the tensor's values at every length, or there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sptransform.graph import dataflow
from sptransform.masks.closed_forms import ClosedForms
from sptransform.op_rules import DEFAULT_RULES
from sptransform.op_rules.closed_forms import Form, index
from sptransform.sharding.sizes import Size
from tests.passes.masks import LENGTH, of_size, open_graph, size

Make = Callable[[], Tensor]


def counted(*bounds: Any) -> Tensor:
    return torch.arange(*(bounds or (size(),)))


def grid() -> Tensor:
    return counted()[:, None] - 2 * counted() + 1


KNOWN: dict[str, Make] = {
    "arange": counted,
    "arange from": lambda: counted(2, size()),
    "arange in steps": lambda: counted(1, 3 * size(), 3),
    "arange down": lambda: counted(size(), 0, -1),
    "sum": lambda: counted() + 3,
    "sum of tensors": lambda: torch.add(counted()[:, None], counted(), alpha=2),
    "difference": lambda: counted() - counted()[:, None],
    "difference, the other way": lambda: 5 - counted(),
    "product": lambda: counted() * 4,
    "negative": lambda: -counted(),
    "absolute": lambda: (counted() - counted()[:, None]).abs(),
    "length": lambda: counted() + size() - 1,
    "broadcast": lambda: counted()[None, :, None] + torch.arange(3)[:, None, None],
    "one of a dimension": lambda: counted()[:, None] + torch.arange(1),
    "unsqueezed": lambda: counted()[None, None, :, None],
    "expanded": lambda: counted().expand(2, 3, size()),
    "transposed": lambda: grid().transpose(0, 1),
    "permuted": lambda: grid()[None].permute(2, 0, 1),
    "viewed": lambda: counted()[None].view(size(), 1),
    "repeated": lambda: counted()[None].expand(2, -1).contiguous().clone(),
    "slice": lambda: counted()[2:],
    "slice in steps": lambda: grid()[1::2],
    "slice of everything": lambda: grid()[:, : size()],
    "indexed": lambda: (counted() * 2)[counted()[:, None]],
    "indexed in both": lambda: grid()[counted()[:, None], counted()],
    "indexed, the other way": lambda: torch.arange(2)[:, None].expand(2, size())[torch.arange(2)[:, None], counted()],
    "counted ones": lambda: torch.ones(2, size(), dtype=torch.long).cumsum(-1) - 1,
    "steps": lambda: torch.diff(counted()[None], prepend=counted()[None, :1] - 1, dim=-1),
    "steps of a grid": lambda: torch.diff(grid(), dim=0),
    "documents of one": lambda: (torch.diff(counted()[None], prepend=counted()[None, :1] - 1) != 1).cumsum(-1),
    "concatenated": lambda: torch.cat([counted()[:1] - 1, counted()]),
    "full": lambda: torch.full((size(), 2), 7),
    "of the shape of": lambda: torch.zeros_like(counted()[:, None]) + counted().new_ones(1),
    "a comparison that is decided": lambda: (counted() >= 0) & ~(counted() + 2 == 1),
    "flags": lambda: torch.ones(size(), dtype=torch.bool) | torch.zeros(size(), dtype=torch.bool),
    "flags as numbers": lambda: torch.ones(size(), dtype=torch.bool).long() + 1,
    "numbers as flags": lambda: torch.full((size(),), 3).bool(),
    "ones in floating point": lambda: torch.ones(size()),
}


UNKNOWN: dict[str, Make] = {
    "rounded": lambda: counted().float(),
    "counted in floating point": lambda: torch.arange(size(), dtype=torch.float32),
    "wrapped": lambda: counted().to(torch.int8),
    "in 32 bits": lambda: counted().int(),
    "remainder": lambda: counted() % 4,
    "halves": lambda: counted() // 2,
    "clamped": lambda: counted().clamp(max=4),
    "from the end": lambda: counted()[-3:],
    "indexed from the end": lambda: counted()[counted() - 1],
    "flat": lambda: grid().flatten(),
    "counted positions": lambda: counted().cumsum(0),
    "a comparison": lambda: counted() > 3,
    "steps of steps": lambda: torch.diff(counted() * counted(), n=2),
    "broken": lambda: torch.cat([counted(), counted()]),
    "broken at the first": lambda: torch.cat([counted()[:1] + 5, counted()]),
    "steps from elsewhere": lambda: torch.diff(counted(), prepend=counted()[:1] - 3),
    "half": lambda: torch.full((size(),), 0.5),
    "flipped": lambda: counted().flip(0),
}


def form_of(make: Make) -> Form | None:
    gm = open_graph(lambda x: make() + 0 * x.sum().to(torch.int64), [torch.zeros(LENGTH, LENGTH, LENGTH)])
    (output,) = gm.graph.output_node().all_input_nodes
    node = output.args[0]
    return ClosedForms(DEFAULT_RULES).of(node)


def value(form: Form, shape: torch.Size, length: int) -> Tensor:
    lengths = {symbol: length // 2 for symbol in form.free_symbols if not str(symbol).startswith("i")}
    entries = [
        form.subs({**lengths, **{index(dim): at for dim, at in enumerate(place)}})
        for place in torch.cartesian_prod(*map(torch.arange, shape)).reshape(-1, len(shape)).tolist()
    ]
    return torch.tensor([int(bool(x)) if x.is_Boolean else int(x) for x in entries]).reshape(shape)


@pytest.mark.parametrize("name", KNOWN)
def test_a_form_has_the_values_of_the_tensor(name: str) -> None:
    form = form_of(KNOWN[name])
    assert form is not None
    for length in (2, LENGTH, 2 * LENGTH):
        with of_size(length):
            expected = KNOWN[name]()
        assert value(form, expected.shape, length).equal(expected.long())


@pytest.mark.parametrize("name", UNKNOWN)
def test_no_form_is_claimed(name: str) -> None:
    assert form_of(UNKNOWN[name]) is None


def test_sizes_are_open() -> None:
    gm = open_graph(lambda x: counted(), [torch.zeros(LENGTH, LENGTH, LENGTH)])
    (output,) = gm.graph.output_node().all_input_nodes
    (length,) = dataflow.shape(output)
    assert not isinstance(length, int) and isinstance(length, Size)
