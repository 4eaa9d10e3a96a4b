"""Writes into random chains of views: values and gradients of the program that writes in place.

Each program writes into some views of one tensor, which were made before, and reads all of them, and the tensor, at
the end. What torch does not let a program write (memory that repeats) is not asked for.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from sptransform.capture.capture import capture
from sptransform.engine.verifier import check_functional
from tests.support.graphs import a_context, run_once

Step = Callable[[torch.Tensor], torch.Tensor]


def a_view(draw: random.Random, shape: tuple[int, ...]) -> Step | None:
    """A view of a tensor of this shape; None where the kind that was drawn has none."""
    dim = draw.randrange(len(shape)) if shape else 0
    size = shape[dim] if shape else 1
    other = draw.randrange(len(shape)) if shape else 0
    at, start = draw.randrange(size), draw.randrange(size)
    step, width = draw.randint(1, 2), draw.randint(1, size)
    kinds: list[Step | None] = [
        lambda x: x.reshape(-1) if x.is_contiguous() else x[...],
        lambda x: x.unsqueeze(dim),
        lambda x: x.as_strided((2,), (1,)) if x.is_contiguous() and x.numel() > 1 and not x.storage_offset() else x,
    ]
    if shape:
        kinds += [
            lambda x: x.select(dim, at),
            lambda x: x.narrow(dim, start, size - start),
            lambda x: torch.ops.aten.slice(x, dim, start, None, step),
            lambda x: x.transpose(dim, other),
            lambda x: x.movedim(dim, other),
            lambda x: x.swapaxes(dim, other),
            lambda x: x.unfold(dim, width, 1).select(dim, 0),
            lambda x: x.unfold(dim, width, width),
            lambda x: x.unsqueeze(0).expand(3, *shape).select(0, 1),
            lambda x: x.chunk(2, dim)[-1],
            lambda x: x.split(width, dim)[0],
            lambda x: x.unbind(dim)[at],
            lambda x: x.squeeze(dim),
            lambda x: x.squeeze(),
        ]
    if len(shape) > 1 and dim != other:
        kinds += [lambda x: x.diagonal(0, dim, other), lambda x: x.mT, lambda x: x.flatten(0, 1)]
    return draw.choice(kinds)


def a_program(seed: int, *, differentiable: bool) -> Callable[..., torch.Tensor]:
    """Makes views of views, writes into three of them, reads them all."""
    draw = random.Random(seed)
    parents: list[int] = []
    steps: list[Step] = []
    like = [torch.zeros(3, 4, 2)]
    while len(steps) < 6:
        parent = draw.randrange(len(like))
        step = a_view(draw, tuple(like[parent].shape))
        made = step(like[parent])
        is_view = made.untyped_storage()._cdata == like[0].untyped_storage()._cdata
        if is_view and made.numel():
            parents.append(parent)
            steps.append(step)
            like.append(made)
    written = [(draw.randrange(len(like)), draw.randrange(4)) for _ in range(3)]

    def program(x: torch.Tensor) -> torch.Tensor:
        h = x * 2 if differentiable else x.detach() * 2
        views = [h]
        for parent, step in zip(parents, steps, strict=True):
            views.append(step(views[parent]))
        for place, kind in written:
            view = views[place]
            if kind == 0:
                view.mul_(3.0)
            elif kind == 1:
                view.add_(views[0].sum())
            elif kind == 2:
                view.copy_(view.detach().cos() * x.sum())
            else:
                view.masked_fill_(view.detach() > 0.5, -1.0)
        return sum(((i + 1.5) * view.sin().sum() for i, view in enumerate(views)), x.sum())

    return program


def check(seed: int) -> None:
    x = torch.randn(3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    for differentiable in (True, False):
        program = a_program(seed, differentiable=differentiable)
        try:
            reference = run_once(program, [x])
        except RuntimeError:
            continue  # one of several views with a gradient, or memory that repeats
        graph = fx.Graph()
        graph.output(graph.call_function(program, (graph.placeholder("x"),)))
        found = capture(fx.GraphModule({}, graph), [x])
        check_functional(found.graph, a_context())
        got = run_once(found, [x])
        for mine, theirs in zip(got.outputs + got.grads, reference.outputs + reference.grads, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-13)


@given(st.integers(0, 10**9))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_random_chains(seed: int) -> None:
    check(seed)


@pytest.mark.slow
@given(st.integers(0, 10**9))
@settings(max_examples=1000, deadline=None, derandomize=True)
def test_many_random_chains(seed: int) -> None:
    check(seed)
