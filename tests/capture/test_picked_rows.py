"""Rows that a mask picks: the same values and gradients without a size that is data, or a refusal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from sptransform.capture.capture import capture
from sptransform.diagnostics.errors import CaptureError
from tests.support.golden import Golden
from tests.support.graphs import Run, captured, run_once, while_captured

Function = Callable[..., torch.Tensor]
NUM_PICKED = 4


def the_inputs() -> list[torch.Tensor]:
    """``x`` of 2 x 5 rows, a mask of them, ``features`` for those that it picks, weights and labels."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, dtype=torch.float64, generator=draw)
    features = torch.randn(NUM_PICKED, 3, dtype=torch.float64, generator=draw)
    weight = torch.randn(6, 3, dtype=torch.float64, generator=draw)
    mask = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 1, 0]]).bool()
    labels = torch.randint(6, (2, 5), generator=draw)
    return [*(each.requires_grad_() for each in (x, features, weight)), mask, labels]


def deepstack(x, features, weight, mask, labels):  # type: ignore[no-untyped-def]
    x = x.clone()
    x[mask, :] = x[mask, :] + features
    return x.sin()


def write_rows(x, features, weight, mask, labels):  # type: ignore[no-untyped-def]
    x = x * 2
    x[mask] = features
    return x.sin()


def write_a_number(x, features, weight, mask, labels):  # type: ignore[no-untyped-def]
    x = x * 2
    x[mask] = 0.5
    x[~mask] *= weight[0]
    return x.sin() * features.sum()


def write_by_places(x, features, weight, mask, labels):  # type: ignore[no-untyped-def]
    """As experts do that are looped over: with the places of the tokens of one expert."""
    out = torch.zeros_like(x)
    for expert in range(2):
        row, token = torch.where(mask if expert else ~mask)
        out[row, token] += F.linear(x[row, token], weight[:3] * (expert + 1)) * labels[row, token, None]
    return out


def add_by_one_index(x, features, weight, mask, labels):  # type: ignore[no-untyped-def]
    """Choices x tokens, of which only the tokens index what is written."""
    tokens = x[0]
    out = torch.zeros_like(tokens)
    choice, token = torch.where(mask)
    current = tokens[None, token].reshape(-1, 3)
    out.index_add_(0, token, torch.tanh(current) * labels[choice, token].unsqueeze(-1))
    return out


def places_of_nonzero(x, features, weight, mask, labels):  # type: ignore[no-untyped-def]
    places = mask.nonzero()
    return (x[places[:, 0], places[:, 1]] * features).sum(0)


def means(x, features, weight, mask, labels):  # type: ignore[no-untyped-def]
    rows = x[mask]
    return rows.mean() + rows.mean(0) * rows.sum() + (rows.sum(-1) * features[:, 0]).mean()


def cross_entropy_of_rows(x, features, weight, mask, labels):  # type: ignore[no-untyped-def]
    """As masked language models compute their loss, of the masked tokens alone."""
    logits = F.linear(x[mask], weight)
    each = F.cross_entropy(logits, labels[mask], reduction="none", label_smoothing=0.1)
    return F.cross_entropy(logits, labels[mask]) * (each * features[:, 1]).sum()


def a_mask_computed_twice(x, features, weight, mask, labels):  # type: ignore[no-untyped-def]
    """As losses of unpadded tokens are written."""
    counted = mask.long()
    logits = F.linear(x, weight)[:, :-1][counted[:, 1:].to(x.device) != 0].contiguous()
    picked = labels[:, 1:][counted[:, 1:] != 0].contiguous()
    return F.cross_entropy(logits.view(-1, 6), picked.view(-1)) + features.sum()


def in_a_row(x, features, weight, mask, labels):  # type: ignore[no-untyped-def]
    return x[:, mask[0]].sum(1) + x[0, mask[0]].sum()


def select(x, features, weight, mask, labels):  # type: ignore[no-untyped-def]
    return x.masked_select(mask[..., None]).sin().sum()


def scatter_features(x, features, weight, mask, labels):  # type: ignore[no-untyped-def]
    """As features of an image take the places of its tokens."""
    return x.masked_scatter(mask[..., None], features) + x.masked_scatter(mask[..., None].expand_as(x), features * 2)


def scatter_entries(x, features, weight, mask, labels):  # type: ignore[no-untyped-def]
    return x.masked_scatter(x.detach() > 0, weight.repeat(2, 1)) * features.sum()


def checked_count(x, features, weight, mask, labels):  # type: ignore[no-untyped-def]
    torch._check(x[mask].shape[0] == features.shape[0])
    return write_rows(x, features, weight, mask, labels)


def infinite_elsewhere(x, features, weight, mask, labels):  # type: ignore[no-untyped-def]
    """What is not picked may be infinite: its gradient is zero all the same."""
    x = torch.where(mask[..., None], x, torch.inf)
    return (x[mask] * features).sum()


def next_rows(x, features, weight, mask, labels):  # type: ignore[no-untyped-def]
    """Those behind the last ones are no rows, and are not picked."""
    row, token = torch.where(mask & (torch.arange(5) < 4))
    return (x[row, token + 1] * x[row, token]).sum() * features.sum()


def no_features(x, features, weight, mask, labels):  # type: ignore[no-untyped-def]
    """As of a text without an image."""
    x = x * 2
    x[mask & (labels < 0)] = features[:0] * weight[0]
    return x.sin()


def a_mask_of_a_deep_state(x, features, weight, mask, labels):  # type: ignore[no-untyped-def]
    """As patches of bytes begin where another model is not sure."""
    state = x
    for _ in range(300):
        state = torch.maximum(state, state)
    return x[state[..., 0] > 0].sin().sum() * features.sum() + x[state[..., 0] > 0].sum()


# The Dynamo of torch 2.11 wants to know whether the two masks pick as many rows, which only data knows.
REFUSED_ONCE = pytest.mark.xfail(torch.__version__ < "2.12", raises=CaptureError, strict=True, reason="torch 2.11")

PROGRAMS = [
    deepstack, write_rows, write_a_number, write_by_places, add_by_one_index, places_of_nonzero, means,
    cross_entropy_of_rows, pytest.param(a_mask_computed_twice, marks=REFUSED_ONCE), in_a_row, select,
    scatter_features, scatter_entries, checked_count, infinite_elsewhere, next_rows, no_features,
    a_mask_of_a_deep_state,
]  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_values_and_gradients(program: Function) -> None:
    def both(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> tuple[Run, Run]:
        found = capture(gm, inputs)
        assert not any(free_unbacked_symbols(n.meta["val"]) for n in found.graph.nodes if "val" in n.meta)
        return run_once(gm, inputs), run_once(found, inputs)

    reference, found = while_captured(program, both, *the_inputs())
    for x, y in zip(reference.outputs + reference.grads, found.outputs + found.grads, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(y, x, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("program", [deepstack, write_rows, checked_count, scatter_features])
def test_another_number_of_rows_is_an_error_when_it_runs(program: Function) -> None:
    """As on one device."""
    gm, inputs = captured(program, *the_inputs())
    of_masks = next(i for i, x in enumerate(inputs) if x.dtype == torch.bool)
    with pytest.raises(RuntimeError, match=r"check of the model|not as many true entries"):
        gm(*inputs[:of_masks], torch.ones(2, 5, dtype=torch.bool), *inputs[of_masks + 1 :])


def by_number(x, features, weight, mask, labels):  # type: ignore[no-untyped-def]
    return x[:, : int(mask.sum())]


def returned(x, features, weight, mask, labels):  # type: ignore[no-untyped-def]
    return x[mask]


def reordered(x, features, weight, mask, labels):  # type: ignore[no-untyped-def]
    return x[mask].flip(0).sum(0)


def reshaped(x, features, weight, mask, labels):  # type: ignore[no-untyped-def]
    return x[mask].view(-1, 2, 3).sum()


def unique(x, features, weight, mask, labels):  # type: ignore[no-untyped-def]
    return torch.unique(labels).sum()


def places_of_two_masks(x, features, weight, mask, labels):  # type: ignore[no-untyped-def]
    x = x * 2
    x[torch.where(mask)[0], torch.where(mask.flip(1))[1]] = features[0]
    return x


def rows_of_rows(x, features, weight, mask, labels):  # type: ignore[no-untyped-def]
    rows = x[mask]
    return rows[rows[:, 0] > 0].sum()


def normed_by_zero(x, features, weight, mask, labels):  # type: ignore[no-untyped-def]
    """Of rows that are not picked it would be infinite."""
    return F.layer_norm(x[mask], (3,), eps=0.0).sum()


def beside_unknown_rows(x, features, weight, mask, labels):  # type: ignore[no-untyped-def]
    x = x * 2
    x[mask] = x[mask] + x[mask].cumsum(-1)
    return x


def joined_to_whole_rows(x, features, weight, mask, labels):  # type: ignore[no-untyped-def]
    """As the text of an image, without its padding. The sum of sizes is one argument, a list."""
    joined = torch.cat([x[0], features, x[mask]])
    return F.pad(joined, (0, 0, 0, 30 - joined.shape[0]))


REFUSED = [
    by_number, returned, reordered, reshaped, unique, places_of_two_masks, rows_of_rows, normed_by_zero,
    beside_unknown_rows, joined_to_whole_rows,
]  # fmt: skip


@pytest.mark.parametrize("program", REFUSED, ids=lambda each: each.__name__)
def test_other_sizes_of_data_are_refused(program: Function, golden: Golden) -> None:
    with pytest.raises(CaptureError) as caught:
        captured(program, *the_inputs())
    golden.check(f"errors_sized_by_data_{program.__name__}", message=str(caught.value))


def test_a_decision_by_a_size_of_data_is_refused() -> None:
    def program(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows = x[mask]
        return rows.sum() if rows.shape[0] > 2 else x.sum()

    with pytest.raises(CaptureError, match="decides by what a tensor holds"):
        captured(program, torch.randn(4, 3), torch.tensor([True, False, True, False]))
