"""Attention with a softcap or sinks as models spell it, what is to be read in each, and what only looks like it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

BATCH, HEADS, KEY_HEADS, LENGTH, WIDTH = 2, 4, 2, 12, 3
HIDDEN = HEADS * WIDTH
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def hidden_keys() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)


def added_mask(fill: float = -math.inf) -> Tensor:
    return torch.zeros(LENGTH, LENGTH, dtype=torch.float64).masked_fill(hidden_keys(), fill)


def column(s: Tensor, length: int = LENGTH) -> Tensor:
    """The sinks as models spell them: one more entry of every row of scores."""
    return s.reshape(1, -1, 1, 1).expand(BATCH, -1, length, -1)


def joined(scores: Tensor, s: Tensor) -> Tensor:
    return torch.cat([scores, column(s)], -1)


# --- spellings of queries, keys and values [batch, heads, sequence, width] and sinks [heads] ----------------------


def capped(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    return (torch.tanh(q @ k.mT / 0.8) * 0.8).softmax(-1) @ v


def capped_and_masked(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.4
    scores = torch.tanh(scores / 1.5)
    scores = scores * 1.5 + added_mask(torch.finfo(torch.float64).min)
    return functional.softmax(scores, dim=-1, dtype=torch.float64) @ v


def scaled_after_the_cap(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """The mask is scaled, the cap is of the product of all numbers behind it."""
    scores = (torch.tanh(q * 2.0 @ k.mT) * 0.5 + added_mask(-1.0)) / 0.25
    return scores.masked_fill(hidden_keys(), -math.inf).softmax(-1) @ v


def capped_under_low_numbers(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """A row of which all keys are masked by a number that swallows the scores is a mean."""
    mask = added_mask(-1e30)
    mask[3] = -1e30
    return (torch.tanh(q @ k.mT) * 1.5 + mask).softmax(-1) @ v


def of_a_negative_scale(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    return torch.tanh(q @ k.mT * -0.7).softmax(-1) @ v


def tempered_inside(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """A scale that only the run knows."""
    return (torch.tanh(q @ k.mT / (v.detach().square().mean() + 0.5)) * 2.0).softmax(-1) @ v


def sunk(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    scores = joined(q @ k.mT * 0.5 + added_mask(torch.finfo(torch.float64).min), s)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return functional.dropout(functional.softmax(scores, -1)[..., :-1], 0.0, training=True) @ v


def sunk_first(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """A row of which all keys are hidden by the lowest number leaves everything to its sink."""
    hidden = hidden_keys() | (torch.arange(LENGTH)[:, None] == 3)
    scores = (q @ k.mT).masked_fill(hidden, torch.finfo(torch.float64).min)
    return torch.cat([column(s), scores], -1).softmax(-1)[..., 1:] @ v


def sunk_and_scaled(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """What comes after the join is done to sinks too."""
    return ((joined(q @ k.mT, s) + 3.0) * 0.3).softmax(-1)[..., :LENGTH] @ v


def one_sink_for_all(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    sink = s.sum().expand(BATCH, HEADS, LENGTH, 1)
    return torch.cat([q @ k.mT, sink], -1).softmax(-1)[..., :-1] @ v


def sunk_heads_in_groups(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """Heads as two dimensions, of which sinks have the outer or the inner one only."""
    q, k, v = (x.unflatten(1, (2, 2)) for x in (q, k, v))
    sinks = s[:2].view(1, 2, 1, 1, 1).expand(BATCH, 2, 2, LENGTH, 1)
    inner = (torch.cat([q @ k.mT, s[2:].view(2, 1, 1).expand(BATCH, 2, 2, LENGTH, 1)], -1)).softmax(-1)[..., :-1] @ v
    return (torch.cat([q @ k.mT, sinks], -1).softmax(-1)[..., :-1] @ v + inner).flatten(1, 2)


def sunk_flat_heads(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """Heads and batch as one dimension."""
    q, k, v = (x.reshape(BATCH * HEADS, LENGTH, WIDTH) for x in (q, k, v))
    scores = torch.cat([torch.bmm(q, k.mT), column(s).reshape(BATCH * HEADS, LENGTH, 1)], -1)
    return torch.bmm(scores.softmax(-1)[..., :-1], v).view(BATCH, HEADS, LENGTH, WIDTH)


def sunk_before_queries(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """Keys before queries in every tensor, and softmax over them."""
    sinks = s[:, None].expand(BATCH, HEADS, LENGTH)[:, :, None]
    return torch.einsum("bhkq,bhkd->bhqd", torch.cat([k @ q.mT, sinks], 2).softmax(2)[:, :, :-1], v)


def capped_and_sunk(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    scores = (torch.tanh(q @ k.mT * 0.5 / 1.2) * 1.2).masked_fill(hidden_keys(), -math.inf)
    return joined(scores, s * 2.0).softmax(-1)[..., :-1] @ v


def key_heads_repeated(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    k, v = (x[:, ::2].unsqueeze(2).expand(-1, -1, 2, -1, -1).reshape(q.shape) for x in (k, v))
    return joined(torch.tanh(q @ k.mT) + added_mask(), s).softmax(-1)[..., :-1] @ v


# the arguments that each has to have: softcap, scale, whether there are sinks
SPELLINGS: dict[Attend, tuple[float, float, bool]] = {
    capped: (0.8, 1.0, False),
    capped_and_masked: (1.5, 0.4, False),
    capped_under_low_numbers: (1.5, 1.5, False),
    scaled_after_the_cap: (2.0, 2.0, False),
    of_a_negative_scale: (1.0, -0.7, False),
    tempered_inside: (2.0, 2.0, False),
    sunk: (0.0, 0.5, True),
    sunk_first: (0.0, 1.0, True),
    sunk_and_scaled: (0.0, 0.3, True),
    one_sink_for_all: (0.0, 1.0, True),
    sunk_before_queries: (0.0, 1.0, True),
    sunk_flat_heads: (0.0, 1.0, True),
    capped_and_sunk: (1.2, 0.5, True),
    key_heads_repeated: (1.0, 1.0, True),
}


# --- what is none -------------------------------------------------------------------------------------------------


def masked_before_the_cap(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    return torch.tanh(q @ k.mT + added_mask(-1.0)).softmax(-1) @ v


def filled_before_the_cap(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    return torch.tanh((q @ k.mT).masked_fill(hidden_keys(), -math.inf)).softmax(-1) @ v


def biased_before_the_cap(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.baddbmm(added_mask(-1.0).expand(BATCH * HEADS, -1, -1), q, k.mT)
    return torch.tanh(scores).softmax(-1) @ v


def shifted_before_the_cap(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    return torch.tanh(q @ k.mT + 1.0).softmax(-1) @ v


def less_its_maximum_before_the_cap(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    scores = q @ k.mT
    return torch.tanh(scores - scores.amax(-1, keepdim=True)).softmax(-1) @ v


def capped_twice(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    return torch.tanh(torch.tanh(q @ k.mT) * 2.0).softmax(-1) @ v


def capped_by_less_than_nothing(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    return (torch.tanh(q @ k.mT) * -2.0).softmax(-1) @ v


def capped_by_a_tensor(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    return (torch.tanh(q @ k.mT) * s.sum()).softmax(-1) @ v


def bounded_otherwise(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    return (torch.sigmoid(q @ k.mT) * 2.0).softmax(-1) @ v


def shifted_before_the_sinks(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    return joined(q @ k.mT + 1.0, s).softmax(-1)[..., :-1] @ v


def less_its_maximum_before_the_sinks(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    scores = q @ k.mT
    return joined(scores - scores.amax(-1, keepdim=True), s).softmax(-1)[..., :-1] @ v


def sinks_of_queries(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    sinks = (s[:, None] * torch.arange(LENGTH)).unsqueeze(-1).expand(BATCH, HEADS, LENGTH, 1)
    return torch.cat([q @ k.mT, sinks], -1).softmax(-1)[..., :-1] @ v


def sinks_of_sequences(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    sinks = s[:BATCH].view(BATCH, 1, 1, 1).expand(BATCH, HEADS, LENGTH, 1)
    return torch.cat([q @ k.mT, sinks], -1).softmax(-1)[..., :-1] @ v


def two_sinks(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    return torch.cat([q @ k.mT, column(s), column(s)], -1).softmax(-1)[..., :-2] @ v


def two_columns(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    sinks = torch.stack([s, s * 2.0], -1)[:, None].expand(BATCH, HEADS, LENGTH, 2)
    return torch.cat([q @ k.mT, sinks], -1).softmax(-1)[..., :-2] @ v


def another_column_is_left_out(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    return joined(q @ k.mT, s).softmax(-1)[..., 1:] @ v


def no_column_is_left_out(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    return joined(q @ k.mT, s).softmax(-1) @ torch.cat([v, v[:, :, :1]], 2)


def a_key_is_left_out(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1)[..., :-1] @ v[:, :, :-1]


def joined_along_queries(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    return torch.cat([q @ k.mT, column(s).mT], 2).softmax(-1)[:, :, :-1] @ v


def masked_after_the_sinks(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    mask = functional.pad(added_mask(-1.0), (0, 1))
    return (joined(q @ k.mT, s) + mask).softmax(-1)[..., :-1] @ v


def capped_after_the_sinks(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    return torch.tanh(joined(q @ k.mT, s)).softmax(-1)[..., :-1] @ v


def tempered_after_the_sinks(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    return (joined(q @ k.mT, s) * v.detach().square().mean()).softmax(-1)[..., :-1] @ v


def sinks_without_gradients(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    with torch.no_grad():
        sinks = column(s)
    return torch.cat([q @ k.mT, sinks], -1).softmax(-1)[..., :-1] @ v


LEFT: list[Attend] = [
    masked_before_the_cap, biased_before_the_cap, filled_before_the_cap, shifted_before_the_cap,
    less_its_maximum_before_the_cap, capped_twice, capped_by_less_than_nothing, capped_by_a_tensor, bounded_otherwise,
    shifted_before_the_sinks, less_its_maximum_before_the_sinks, sinks_of_queries, sinks_of_sequences, two_sinks,
    two_columns, another_column_is_left_out, no_column_is_left_out, a_key_is_left_out, joined_along_queries,
    masked_after_the_sinks, capped_after_the_sinks, tempered_after_the_sinks, sinks_without_gradients,
]  # fmt: skip
