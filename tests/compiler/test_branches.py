"""Branches that data decides: those of which one side only raises become checks, others are refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend

from sptransform.capture.capture import capture
from sptransform.diagnostics.errors import CaptureError
from tests.support.graphs import compiled_with
from tests.support.tiers import tiered

Function = Callable[[Tensor], Tensor]


def raises_if(x: Tensor) -> Tensor:
    if x.max() >= 3.0:
        raise ValueError(f"no entry may reach {len(x.shape)}")
    return x * 2


def raises_unless(x: Tensor) -> Tensor:
    if not (x < 3.0).all():
        limit = 3
        raise ValueError("entries must be below " + str(limit))
    return x * 2


def raises_otherwise(x: Tensor) -> Tensor:
    with torch.no_grad():
        if x.max() < 3.0:
            y = x * 2
        else:
            raise ValueError
    return y


def raises_if_either(x: Tensor) -> Tensor:
    if x.shape[0] == 1 or x.max() >= 3.0 or x.isnan().any():
        raise ValueError("outside of the range")
    return x * 2


def raises_unless_both(x: Tensor) -> Tensor:
    if not (x.isnan().sum() == 0 and x.max() < 3.0):
        raise ValueError("outside of the range")
    return x * 2


def raises_for_a_number(x: Tensor) -> Tensor:
    if x.max().item() >= 3.0:
        raise ValueError("outside of the range")
    return x * 2


RAISING = [raises_if, raises_unless, raises_otherwise, raises_if_either, raises_unless_both, raises_for_a_number]


@pytest.mark.parametrize("program", tiered(RAISING, quick=[raises_if_either]), ids=lambda program: program.__name__)
def test_a_branch_that_only_raises_is_a_check(program: Function) -> None:
    x = torch.arange(3.0)
    compiled = lambda x: compiled_with(program, capture, x)  # noqa: E731
    assert torch.equal(compiled(x), x * 2)
    # a graph that stops within `no_grad` leaves that mode on
    with torch.enable_grad(), pytest.raises(RuntimeError, match=r"test_branches\.py:\d+: raise ValueError"):
        compiled(x + 1)


def raises_with_quotes(x: Tensor) -> Tensor:
    if x.max() >= 3.0:
        raise ValueError('"no\\t" is said')
    torch._assert_async(x.min() >= 0.0, 'neither "yes"\n')
    return x * 2


@pytest.mark.slow
@pytest.mark.inductor
def test_what_a_check_says_may_hold_quotes() -> None:
    """Inductor writes it in C++."""

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        return lookup_backend("inductor")(capture(gm, inputs), inputs)

    x = torch.arange(3.0)
    assert torch.equal(compiled_with(raises_with_quotes, backend, x), x * 2)
    with pytest.raises(RuntimeError, match=r"test_branches\.py:\d+: raise ValueError\('"):
        compiled_with(raises_with_quotes, backend, x + 1)


def caught(x: Tensor) -> Tensor:
    try:
        raises_if(x)
    except ValueError:
        return x * 3
    return x * 2


def suppressed(x: Tensor) -> Tensor:
    with contextlib.suppress(ValueError):
        raises_if(x)
    return x * 2


def either(x: Tensor) -> Tensor:
    return x * 2 if x.max() > 3.0 else x * 3


def drops(x: Tensor) -> Tensor:
    return x * 2 if torch.rand([]) < 0.5 else x * 3


def drawn_and_written(x: Tensor) -> Tensor:
    drawn = torch.rand([])
    drawn.add_(5.0)
    return x * 2 if drawn < 1.0 else x * 3


def drawn_and_written_through_a_view(x: Tensor) -> Tensor:
    drawn = torch.rand(1)
    drawn.view([]).fill_(5.0)
    return x * 2 if drawn < 1.0 else x * 3


GOING_ON = [caught, suppressed, either, drops, drawn_and_written, drawn_and_written_through_a_view]


@pytest.mark.parametrize("program", tiered(GOING_ON, quick=[caught]), ids=lambda program: program.__name__)
def test_a_branch_that_goes_on_either_way_is_refused(program: Function) -> None:
    with pytest.raises(CaptureError, match=r"test_branches\.py"):
        compiled_with(program, capture, torch.arange(3.0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decide", "expected"),
    [
        (lambda: torch.rand([]) < 0.0, False),
        (lambda: torch.rand([]) >= 0, True),
        (lambda: torch.rand(1) <= 1.0, True),
        (lambda: torch.rand(()) > 1, False),
        (lambda: 1.0 > torch.rand([]), True),  # noqa: SIM300
    ],
)
def test_a_draw_that_cannot_decide(decide: Callable[[], Tensor], expected: bool) -> None:
    program = lambda x: x * 2 if decide() else x * 3  # noqa: E731
    x = torch.arange(3.0)
    assert torch.equal(compiled_with(program, capture, x), x * (2 if expected else 3))


@pytest.mark.slow
@pytest.mark.parametrize("compare", [lambda: torch.rand([]) <= 0.0, lambda: torch.rand([]) > 0])
def test_a_draw_of_zero_decides(compare: Callable[[], Tensor]) -> None:
    with pytest.raises(CaptureError, match=r"test_branches\.py"):
        compiled_with(lambda x: x * 2 if compare() else x, capture, torch.arange(3.0))
