"""Graphs without writes: the same values and gradients as the program that writes in place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

from sptransform.capture.capture import capture
from sptransform.diagnostics.errors import CaptureError
from sptransform.engine.verifier import check_functional
from sptransform.graph import notes
from sptransform.graph.printer import text
from tests.support.golden import Golden
from tests.support.graphs import Run, a_context, captured, compiled_with, copied, run_once, while_captured
from tests.support.tiers import tiered

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def an_input() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(4, dtype=torch.float64, requires_grad=True)


def add_in_place(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x * 2
    h += 1
    h *= v
    return h.sin()


def write_column(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x * 2
    h[:, 0] = v[:3]
    return h.sin()


def write_slice(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x * 2
    h[1:, 1:3] = v[:2]
    return h.sin()


def write_strided(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x * 2
    h[:, ::2] *= 3
    return h * v


def fill_masked(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x * 2
    h.masked_fill_(x > 0.3, -1.0)
    return h * v


def view_of_view(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x * 2
    part = h[1:][:, 1:]
    part += v[1:]
    return h.sin() * 2


def row_of_slice(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x * 2
    h[1:][0].mul_(v)
    return h.sin()


def stale_view(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x * 2
    row = h[0]
    h += v
    return row.sin() + h[1]


def stale_view_of_a_view(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x * 2
    entry = h[1:][:, 2]
    h.mul_(v)
    return entry.sin()


def base_after_a_view_was_written(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x * 2
    first, second = h[0], h[0]
    first.add_(v)
    return second * 2 + h[1]


def two_views_written_in_turn(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x * 2
    rows, column = h[:2], h[:, 1]
    rows.mul_(v)
    column.add_(1.0)
    rows.add_(column[:2].unsqueeze(1).clone())
    return h.sin()


def through_an_alias(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x * 2
    same = h[:]
    same += v
    return h.sin()


def through_detach(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x.detach() * 2
    h += 1
    return h * v


def copy_whole(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = torch.zeros(3, 4, dtype=torch.float64)
    h.copy_(x)
    h[0].copy_(v)
    return h.sin()


def copy_broadcasts_and_converts(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = torch.zeros(3, 4, dtype=torch.float32)
    h.copy_(v)
    return h.double() * x


def fill_and_zero(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x * 2
    h[0].zero_()
    h[1].fill_(3.0)
    return h * v


def result_of_the_write(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x * 2
    return h.add_(v).mul_(2.0) + h


def clamp_and_activate(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x * 2
    h.clamp_(max=1.5).sin_()
    return torch.relu_(h) + v


def index_put(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x * 2
    h[torch.tensor([0, 2]), torch.tensor([1, 1])] = v[:2]
    return h.sin()


def write_to_a_clone(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x * 2
    saved = h.clone()
    h += v
    return saved * h


def float_to_narrow(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The written tensor keeps its dtype."""
    h = (x * 2).float()
    h += v
    h *= v.double()
    return h.double()


def through_transposes(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x * 2
    h.t()[1].mul_(3.0)
    h.transpose(0, 1).add_(v[:, None])
    h.view(2, 3, 2).permute(2, 0, 1)[0].mul_(2.0)
    return h.sin()


def through_a_square_transpose(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """It has its base's shape: written back as it is, it would be transposed."""
    h = x[:, :3] * 2
    h.t().add_(v[:3])
    return h.sin()


def through_reshapes(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x * 2
    h.view(-1)[3] = v[0]
    h.unsqueeze(0)[0, 1] = v
    h.flatten()[5:7].mul_(2.0)
    return h.sin()


def through_no_op(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x * 2
    h.contiguous().add_(v)
    h.to(torch.float64).mul_(v)
    return h.sin()


def on_the_diagonal(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x * 2
    h.diagonal().add_(v[:3])
    return h.sin()


def pieces(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Only of a tensor without gradients: autograd lets nobody write into one of several views."""
    h = x.detach() * 2
    first, second = h.chunk(2, -1)
    second.mul_(3.0)
    row = h.unbind(0)[1]
    row /= row.sum()
    return h.sin() * first.sum() * v


def one_of_several_results(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """As a router divides its chosen probabilities by their sum."""
    top, indices = torch.topk(x * v, 2)
    top /= top.sum(-1, keepdim=True)
    return top * indices


def repeated_memory(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A row of an expanded tensor is all its rows."""
    h = (x * 2)[:, None].expand(3, 5, 4)
    h[:, 0].mul_(v)
    return h[:, 1].sin() + h[:, 2]


def windows(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x * 2
    h.unfold(1, 2, 1)[:, 1].mul_(3.0)
    return h.sin()


def by_strides(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x * 2
    every_fifth = h.as_strided((3,), (5,))
    h.add_(1.0)
    every_fifth.mul_(v[:3])
    return h.sin() + every_fifth.sum()


def transposed_in_place(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x * 2
    row = h[0]
    h.t_()
    h.add_(v[:, None])
    return h.unsqueeze_(0).sin() * row[None, :, None]


def into_out(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = torch.ones(2, 3, 4, dtype=torch.float64)
    torch.add(x.detach(), v.detach(), out=h[1])
    return h * x


def windows_written_twice(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The second write is through a view of what the first one wrote."""
    h = x * 2
    found = h.unfold(1, 2, 2)
    found[..., 0].mul_(2.0)
    found[..., 1] = v[:2]
    return h.sin()


def other_overloads(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """In place they are called otherwise than out of place."""
    h = x * 2
    h.pow_(2)
    h.transpose_(0, 1)
    positions, seen = torch.arange(4), x.t() > 0
    positions[1:] //= 2
    seen &= h > 0.5
    seen |= h > 2
    return h * positions[:, None] * seen


def masked_under_no_grad(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What is computed under no_grad has no gradient to lose."""
    with torch.no_grad():
        scale = torch.zeros(3, 4, dtype=torch.float64)
        scale.add_(x * v)
        scale[0] = v
        scale.mul_(2.0)
    return x * scale


def data(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x * v
    return h * h.data


def written_through_detach(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The value changes, also that of older views, and the gradient does not."""
    h = x * 2
    row = h[0]
    h.detach().add_(1.0)
    return h.sin() * row


def written_through_a_piece_of_data(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x * v
    rows = h.data[1:]
    rows[:, ::2].mul_(v.detach()[:2])
    return h.sin() * rows.sum(0)


def scaled_under_no_grad(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x * 2
    with torch.no_grad():
        h[0].mul_(v)
    return h.sin()


def infinite_under_no_grad(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x / (x > 0)
    with torch.no_grad():
        h.masked_fill_(h.isinf(), 3.0)
    h *= v
    return h


def written_by_value_then_hidden(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = torch.zeros_like(x)
    h[1] = v * 2
    h.data.sub_(1.0)
    h[:, 0] += v[:3]
    return h.cos()


def leaf_clamped(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    before = x + v
    x.data.clamp_(-0.5, 0.5)
    return x.sin() * before


def leaf_scaled_under_no_grad(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        x[:, 1:].mul_(2.0)
    return x.sin() * v


def detached_gets_its_own_gradient(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What is written into it has a gradient, which the tensor that it was detached from has not."""
    h = x * 2
    d = h.detach()
    d += v
    h.mul_(v)
    d[:, :2].mul_(v[:2])
    return h.sin() + d.cos()


def detached_within_detached(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x * 2
    rows = h[1:].detach()
    column = rows[:, 2].detach()
    column.mul_(v[:2])
    rows.mul_(v)
    with torch.no_grad():
        column.add_(1.0)
    column.add_(v[2:])
    return h.sin() + rows.sum(0) + column.cos().sum()


def without_gradient_written_through_data(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = torch.ones_like(x)
    part = h.data[1:]
    part.mul_(v)
    return h * x + part.sum(0)


def stale_view_read_under_no_grad(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x * 2
    row = h[0]
    h.mul_(v)
    with torch.no_grad():
        mean = row.mean()
    return row * mean


HIDDEN = [
    detached_gets_its_own_gradient,
    written_through_detach,
    written_through_a_piece_of_data,
    scaled_under_no_grad,
    infinite_under_no_grad,
    written_by_value_then_hidden,
    leaf_clamped,
    leaf_scaled_under_no_grad,
    detached_within_detached,
    without_gradient_written_through_data,
    stale_view_read_under_no_grad,
]

PROGRAMS = [
    *HIDDEN,
    windows_written_twice,
    other_overloads,
    masked_under_no_grad,
    data,
    pieces,
    one_of_several_results,
    repeated_memory,
    windows,
    by_strides,
    transposed_in_place,
    into_out,
    through_transposes,
    through_a_square_transpose,
    through_reshapes,
    through_no_op,
    on_the_diagonal,
    add_in_place,
    write_column,
    write_slice,
    write_strided,
    fill_masked,
    view_of_view,
    row_of_slice,
    stale_view,
    stale_view_of_a_view,
    base_after_a_view_was_written,
    two_views_written_in_turn,
    through_an_alias,
    through_detach,
    copy_whole,
    copy_broadcasts_and_converts,
    fill_and_zero,
    result_of_the_write,
    clamp_and_activate,
    index_put,
    write_to_a_clone,
    float_to_narrow,
]
MIXED = (copy_broadcasts_and_converts, float_to_narrow)


def both(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> tuple[Run, Run]:
    """The program as written, and its functional graph."""
    functional = capture(gm, inputs)
    check_functional(functional.graph, a_context())
    return run_once(gm, inputs), run_once(functional, inputs)


@pytest.mark.parametrize(
    "program",
    tiered(PROGRAMS, quick=[each for each in PROGRAMS if each not in HIDDEN[3:]]),
    ids=lambda program: program.__name__,
)
def test_values_and_gradients(program: Function) -> None:
    reference, found = while_captured(program, both, *an_input())
    assert found.outputs[0].dtype == reference.outputs[0].dtype
    for x, y in zip(reference.outputs + reference.grads, found.outputs + found.grads, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            # where dtypes are mixed, gradients are rounded in another order
            torch.testing.assert_close(y, x, rtol=0, atol=1e-6 if program in MIXED else 0)


@pytest.mark.parametrize("program", [write_column, stale_view, two_views_written_in_turn])
def test_recorded_values_fit_what_runs(program: Function) -> None:
    """Shape and dtype noted on each node are those it computes."""
    gm, inputs = captured(program, *an_input())

    class Checked(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            result = super().run_node(n)
            if isinstance(result, torch.Tensor):
                assert (n.meta["val"].shape, n.meta["val"].dtype) == (result.shape, result.dtype), n
            return result

    Checked(gm).run(*copied(inputs))


def test_golden(golden: Golden) -> None:
    gm, _ = captured(two_views_written_in_turn, *an_input())
    golden.check("functionalize", after=text(gm.graph.nodes))


class Running(nn.Module):
    """Keeps a running mean, as batch norms do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return (x - self.mean) * self.count


def test_buffers_are_written_back() -> None:
    x, _ = an_input()
    eager, compiled = Running(), Running()

    def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        functional = capture(gm, inputs)
        check_functional(functional.graph, a_context())
        return functional

    for step in (1, 2):
        expected = eager(x)
        found = compiled_with(compiled, backend, x)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
        torch.testing.assert_close(compiled.mean, eager.mean, rtol=0, atol=1e-14)
        assert compiled.count == eager.count == step


def test_a_view_of_a_buffer_is_written_back() -> None:
    def program(buffer: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        buffer[:, 1] = x.detach()[:, 0]
        return buffer.sum() * x

    x, _ = an_input()
    eager, compiled = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    expected = program(eager, x)
    torch.testing.assert_close(compiled_with(program, capture, compiled, x), expected)
    assert torch.equal(compiled, eager) and compiled.abs().sum() > 0


class Clamped(nn.Module):
    """Clamps its weight in place, as Gemma 3n does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weight.data.clamp_(-0.5, 0.5)
        return (x * self.weight).sum()


def test_a_leaf_is_written_back() -> None:
    """Through AOTAutograd, and so that an optimizer goes on from the new value."""
    x, _ = an_input()
    eager, compiled = Clamped(), Clamped()

    def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        return lookup_backend("aot_eager")(capture(gm, inputs), inputs)

    for module, loss in ((eager, eager(x)), (compiled, compiled_with(compiled, backend, x))):
        loss.backward()
        torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert torch.equal(compiled.weight, eager.weight) and torch.equal(compiled.weight.grad, eager.weight.grad)


class Centered(nn.Module):
    """Reads a buffer and a leaf before it writes them, in ops that keep nothing for their backward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-2, 2, 4, dtype=torch.float64))
        self.register_buffer("center", torch.linspace(1, 2, 4, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2 - self.center + self.weight
        self.center.mul_(0.5)
        self.weight.data.mul_(0.5)
        return (y * self.weight * self.center).sin().sum()


@pytest.mark.slow
def test_the_backward_has_what_an_input_held_before() -> None:
    """AOTAutograd computes it again from inputs, which by then hold what was written."""
    x, _ = an_input()
    eager, compiled = Centered(), Centered()

    def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        return lookup_backend("aot_eager")(capture(gm, inputs), inputs)

    eager(x).backward()
    compiled_with(compiled, backend, x).backward()
    torch.testing.assert_close(compiled.weight.grad, eager.weight.grad, rtol=0, atol=1e-14)
    assert torch.equal(compiled.weight, eager.weight) and torch.equal(compiled.center, eager.center)


@pytest.mark.parametrize("name", tiered(["dropout_", "alpha_dropout_", "feature_dropout_"], quick=["dropout_"]))
def test_a_form_that_calls_what_is_written_otherwise(name: str) -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        h = x * 2
        getattr(torch, name)(h, 0.5, False)
        return h.sin()

    gm, _ = captured(program, torch.randn(4, 4))
    assert name.removesuffix("_") in str(gm.graph) and f"{name}." not in str(gm.graph)


def test_a_write_that_has_no_functional_form(golden: Golden) -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        h = x * 2
        h.normal_()
        return h.sin()

    with pytest.raises(CaptureError) as caught:
        captured(program, torch.randn(4, 4))
    golden.check("errors_no_functional_form", message=str(caught.value))


def test_a_write_into_a_list_of_tensors() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        parts = [x * 2, x * 3]
        torch._foreach_add_(parts, 1.0)
        return parts[0] * parts[1]

    with pytest.raises(CaptureError, match="no out-of-place form"):
        captured(program, torch.randn(4, 4))


def test_a_write_through_a_view_that_cannot_be_written_back(golden: Golden) -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        h = x * 2
        h.view(torch.int32).add_(1)
        return h.sin()

    with pytest.raises(CaptureError) as caught:
        captured(program, torch.randn(4, 3))
    golden.check("errors_view_not_written_back", message=str(caught.value))


def kept_by_a_product(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = x + v
    y = h * h
    h.data.mul_(2.0)
    return y


def kept_through_a_view(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    y = x.t()[1:].sin()
    x.data.clamp_(-0.1, 0.1)
    return y


def kept_by_what_made_it(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = (x * v).exp()
    h.data[0].zero_()
    return h


def without_gradient_kept(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h = torch.ones_like(x)
    y = h * v
    h.data.add_(2.0)
    return y


def kept_where_no_backward_comes(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """As codebooks that follow their means are: the nearest code has no gradient."""
    codes = torch.ones_like(x)
    nearest = (x * codes).argmax(-1)
    codes.data.add_(2.0)
    return codes[0, nearest][:, None] * v + x


@pytest.mark.slow
def test_a_hidden_write_into_what_no_backward_reads() -> None:
    reference, found = while_captured(kept_where_no_backward_comes, both, *an_input())
    for x, y in zip(reference.outputs + reference.grads, found.outputs + found.grads, strict=True):
        assert torch.equal(x, y)


@pytest.mark.slow
@pytest.mark.parametrize(
    "program", [kept_by_a_product, kept_through_a_view, kept_by_what_made_it, without_gradient_kept]
)
def test_a_hidden_write_into_what_a_backward_reads(program: Function) -> None:
    """One device's backward reads what was written since, and says nothing if it was written through ``data``."""
    with pytest.raises(CaptureError, match="that a backward reads"):
        captured(program, *an_input())


def test_pieces_of_a_split_are_read_anew() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        h = x * 2
        first, second = h.chunk(2, -1)
        h.add_(1.0)
        return first * second

    reference, found = while_captured(program, both, torch.randn(4, 4))
    assert torch.equal(reference.outputs[0], found.outputs[0])


def test_every_node_has_a_note_of_its_own() -> None:
    for program in PROGRAMS:
        gm, _ = captured(program, *an_input())
        own = [id(notes.note(node)) for node in gm.graph.nodes]
        assert len(set(own)) == len(own), program


def test_graphs_without_writes_are_left_alone() -> None:
    def both(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> None:
        assert "scatter" not in text(capture(gm, inputs).graph.nodes)

    while_captured(lambda x: x[:, 1].sin(), both, torch.randn(3, 3))
