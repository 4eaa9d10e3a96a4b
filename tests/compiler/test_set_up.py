"""What a model sets up under a lock at its first call is set up before it is captured; other locks are refused."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from sptransform.diagnostics.errors import CaptureError
from tests.support.golden import Golden
from tests.support.graphs import compiled_with

_lock = threading.Lock()


def install(module: nn.Module, *, factor: float) -> None:
    """As transformers installs the hooks that collect hidden states."""
    if getattr(module, "installed", False):
        return
    with _lock:
        module.register_forward_hook(lambda module, args, output: output * factor)
        module.installed = True


class SetsUp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        install(self.inner, factor=3.0)
        return self.inner(x)


class AlwaysLocks(SetsUp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with _lock:
            return self.inner(x)


def locked_sum(x: torch.Tensor) -> torch.Tensor:
    with _lock:
        return x.sum()


class LocksForATensor(SetsUp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return locked_sum(self.inner(x))


def set_factor(module: nn.Module, factor: float) -> None:
    """Called anew with what it has now, it would double twice."""
    factor *= 2
    with _lock:
        module.factor = factor


class RebindsArgument(SetsUp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self.inner, "factor"):
            set_factor(self.inner, 3.0)
        return self.inner(x) * self.inner.factor


def count_in(module: nn.Module, found: Sequence[int]) -> None:
    with _lock:
        module.count = len(found) * module.step


class ChangesArgument(SetsUp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self.inner, "count"):
            self.inner.step = 2
            count_in(self.inner, (1, 2))
        return self.inner(x) * self.inner.count


class MakesList(SetsUp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = [1, 2]
        if not hasattr(self.inner, "count"):
            count_in(self.inner, found)
        return self.inner(x) * self.inner.count


def note_mode(module: nn.Module) -> None:
    if not hasattr(module, "recorded"):
        with _lock:
            module.recorded = torch.is_grad_enabled()


class WithoutGradients(SetsUp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            note_mode(self.inner)
        return self.inner(x) * (3 if self.inner.recorded else 2)


def compiled(model: nn.Module, x: torch.Tensor) -> Any:
    return compiled_with(model, lambda gm, inputs: gm, x)


def test_a_set_up_runs_first() -> None:
    model, x = SetsUp(), torch.randn(2, 4)
    found = compiled(model, x)
    assert model.inner.installed and len(model.inner._forward_hooks) == 1
    torch.testing.assert_close(found, model(x))
    torch.testing.assert_close(found, 3 * (x @ model.inner.weight.t() + model.inner.bias))


def test_a_set_up_runs_in_the_grad_mode_of_its_place() -> None:
    model, x = WithoutGradients(), torch.randn(2, 4)
    torch.testing.assert_close(compiled(model, x), 2 * model.inner(x))


@pytest.mark.parametrize("kind", [RebindsArgument, ChangesArgument, MakesList])
def test_a_set_up_whose_arguments_are_not_those_of_its_call_is_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(CaptureError, match="whose arguments the model computes"):
        compiled(kind(), torch.randn(2, 4))


@pytest.mark.parametrize("kind", [AlwaysLocks, LocksForATensor])
def test_other_locks_are_refused(kind: type[nn.Module], golden: Golden) -> None:
    with pytest.raises(CaptureError) as caught:
        compiled(kind(), torch.randn(2, 4))
    golden.check(f"errors_lock_{kind.__name__}", message=str(caught.value))


def test_what_dynamo_cannot_capture_is_refused_at_its_line(golden: Golden) -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x.sin()

    with pytest.raises(CaptureError) as caught:
        compiled_with(program, lambda gm, inputs: gm, torch.randn(2))
    golden.check("errors_graph_break", message=str(caught.value))
