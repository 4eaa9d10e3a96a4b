"""Changes of placement in which the ranks differ: uneven sequences and heads, ranks that own nothing. Real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.gloo_pool import get_pool
from tests.support.redistributes import EVEN, UNEVEN, Change, PerRank, apply, check

NUM_RANKS = 3
pytestmark = pytest.mark.timeout(120)


def on_rank(
    rank: int, world_size: int, name: str, arguments: tuple[Any, ...], inputs: PerRank, cotangents: PerRank
) -> tuple[list[Tensor], list[Tensor]]:
    """What a worker does: outputs and gradients of the op on its own tensors."""
    xs = [x.clone().requires_grad_() for x in inputs[rank]]
    ys = apply(name, arguments, xs)
    grads = torch.autograd.grad(ys, xs, cotangents[rank])
    return [y.detach() for y in ys], list(grads)


def real(name: str, arguments: tuple[Any, ...], inputs: PerRank, cotangents: PerRank) -> tuple[PerRank, PerRank]:
    results = get_pool(len(inputs)).run(on_rank, name, arguments, inputs, cotangents, timeout=60)
    outputs, grads = zip(*results, strict=True)
    return list(outputs), list(grads)


@pytest.mark.parametrize("changed", UNEVEN, ids=str)
def test_change_of_placement(changed: Change) -> None:
    check(changed, NUM_RANKS, real)


@pytest.mark.parametrize("changed", [EVEN[5], EVEN[-1]], ids=str)
def test_simulated_ranks_do_what_real_ones_do(changed: Change) -> None:
    check(changed, 4, real)


@pytest.mark.slow
@pytest.mark.parametrize("changed", [*UNEVEN, *EVEN], ids=str)
def test_complex_numbers_travel_as_their_parts(changed: Change) -> None:
    check(changed, NUM_RANKS if changed in UNEVEN else 4, of_complex_numbers)


def of_complex_numbers(
    name: str, arguments: tuple[Any, ...], inputs: PerRank, cotangents: PerRank
) -> tuple[PerRank, PerRank]:
    """What real ranks make of complex numbers whose real parts are these; the imaginary parts are twice as large."""

    def twofold(given: PerRank) -> PerRank:
        return [[torch.complex(x, 2 * x) for x in own] for own in given]

    def halved(found: PerRank) -> PerRank:
        assert all(torch.equal(2 * x.real, x.imag) for own in found for x in own)
        return [[x.real for x in own] for own in found]

    outputs, grads = real(name, arguments, twofold(inputs), twofold(cotangents))
    return halved(outputs), halved(grads)
