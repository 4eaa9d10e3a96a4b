"""Random small models, float64: loss and all gradients on every rank equal one device's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from sptransform.engine.strategy import Strategy
from sptransform.strategies.megatron import MegatronSP
from sptransform.strategies.ring import AllGatherKV, Ring
from sptransform.strategies.ulysses import Ulysses
from tests.support.graphs import assert_ranks_equal_one_device, on_ranks

BATCH, HEADS, HIDDEN, VOCAB = 2, 4, 8, 11
UNARY: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    torch.tanh,
    torch.sin,
    functional.gelu,
    torch.neg,
    lambda x: x * 0.5 + 1.0,
    lambda x: x.softmax(-1),
    lambda x: x.pow(2),
)


@dataclass(frozen=True)
class Step:
    """One op on earlier values: `first` and `second` pick them, `option` picks a form of the op."""

    kind: str
    first: int
    second: int
    option: int


class Steps(nn.Module):
    """Runs the steps, each appending a `[batch, length, hidden]` value; the last ends in a scalar."""

    def __init__(self, steps: list[Step], has_embedding: bool, ending: int) -> None:
        super().__init__()
        self.steps, self.ending = steps, ending
        self.tokens = nn.Embedding(VOCAB, HIDDEN) if has_embedding else None
        self.layers = nn.ModuleDict()
        self.double()

    def layer(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        return self.layers[name]

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        values = [x if self.tokens is None else self.tokens(x)]
        for at, step in enumerate(self.steps):
            first = values[step.first % len(values)]
            alike = [v for v in values if v.shape[1] == first.shape[1]]
            second = alike[step.second % len(alike)]
            values.append(getattr(self, step.kind)(str(at), first, second, step.option, mask))
        last = values[-1]
        # an attention nobody reads would be no part of the graph, and nothing else says what the sequence is
        attended = sum(v.sum() for v, step in zip(values[1:], self.steps, strict=True) if step.kind == "attention")
        return self.end(last) + 0.1 * attended

    def end(self, last: torch.Tensor) -> torch.Tensor:
        logits = self.layer("head", lambda: nn.Linear(last.shape[-1], VOCAB, bias=False))(last)
        if self.ending == 0:
            return logits.pow(2).mean()
        if self.ending == 1:
            return logits.logsumexp(-1).sum()
        labels = torch.arange(last.shape[1]).remainder(VOCAB).expand(BATCH, -1)
        labels = labels.masked_fill(labels == 3, -100)
        return functional.cross_entropy(logits.reshape(-1, VOCAB), labels.reshape(-1))

    def unary(self, name: str, x: torch.Tensor, y: torch.Tensor, option: int, mask: torch.Tensor) -> torch.Tensor:
        return UNARY[option % len(UNARY)](x)

    def linear(self, name: str, x: torch.Tensor, y: torch.Tensor, option: int, mask: torch.Tensor) -> torch.Tensor:
        return self.layer(name, lambda: nn.Linear(x.shape[-1], HIDDEN, bias=option % 2 == 0))(x)

    def norm(self, name: str, x: torch.Tensor, y: torch.Tensor, option: int, mask: torch.Tensor) -> torch.Tensor:
        return self.layer(name, lambda: nn.LayerNorm(x.shape[-1]))(x)

    def flat(self, name: str, x: torch.Tensor, y: torch.Tensor, option: int, mask: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        rows = self.layer(name, lambda: nn.Linear(x.shape[-1], x.shape[-1]))(rows) if option % 2 else rows.tanh()
        return rows.view(x.shape)

    def across(self, name: str, x: torch.Tensor, y: torch.Tensor, option: int, mask: torch.Tensor) -> torch.Tensor:
        dims = ((1, 2), (0, 1), (0, 2))[option % 3]
        return x.transpose(*dims).sin().contiguous().transpose(*dims)

    def binary(self, name: str, x: torch.Tensor, y: torch.Tensor, option: int, mask: torch.Tensor) -> torch.Tensor:
        if y.shape[-1] != x.shape[-1]:
            y = y.mean(-1, keepdim=True)
        return (x + y, x * y, x - y)[option % 3]

    def narrow(self, name: str, x: torch.Tensor, y: torch.Tensor, option: int, mask: torch.Tensor) -> torch.Tensor:
        half = max(x.shape[-1] // 2, 1)
        return (x[..., :half], x[..., -half:], x.chunk(2, -1)[0])[option % 3]

    def joined(self, name: str, x: torch.Tensor, y: torch.Tensor, option: int, mask: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, y.tanh()] if option % 2 else [y, x, y], -1)[..., :HIDDEN]

    def reduced(self, name: str, x: torch.Tensor, y: torch.Tensor, option: int, mask: torch.Tensor) -> torch.Tensor:
        pool = torch.sum if option % 2 else torch.mean
        return x + pool(x, (1, -1, (0, 2), (0, 1, 2))[option // 2], keepdim=True) * 0.1

    def shifted(self, name: str, x: torch.Tensor, y: torch.Tensor, option: int, mask: torch.Tensor) -> torch.Tensor:
        if x.shape[1] < 4:
            return x
        before, after = functional.pad(x, (0, 0, 1, 0)), functional.pad(x, (0, 0, 0, 1))
        return (x[:, :-1], x[:, 1:], before[:, :-1], after)[option % 4]

    def attention(self, name: str, x: torch.Tensor, y: torch.Tensor, option: int, mask: torch.Tensor) -> torch.Tensor:
        form, num_keys = option % 4, HEADS if option % 2 else HEADS // 2
        width = HIDDEN // HEADS

        def heads(which: str, source: torch.Tensor, count: int) -> torch.Tensor:
            layer = self.layer(name + which, lambda: nn.Linear(source.shape[-1], count * width))
            return layer(source).view(BATCH, -1, count, width).transpose(1, 2)

        query, key, value = heads("q", x, HEADS), heads("k", y, num_keys), heads("v", y, num_keys)
        if num_keys != HEADS and option % 8 < 4:
            key, value = (z.repeat_interleave(HEADS // num_keys, 1) for z in (key, value))
        own_mask = mask[: x.shape[1], : y.shape[1]]
        bias = torch.zeros_like(own_mask, dtype=x.dtype).masked_fill(~own_mask, -5.0)
        out = functional.scaled_dot_product_attention(
            query, key, value, (None, None, own_mask, bias)[form], is_causal=form == 1, enable_gqa=key.shape[1] != HEADS
        )
        return out.transpose(1, 2).reshape(BATCH, -1, HIDDEN)

    def spelled(self, name: str, x: torch.Tensor, y: torch.Tensor, option: int, mask: torch.Tensor) -> torch.Tensor:
        """Attention as two products around a softmax."""
        query, key = (
            self.layer(name + which, lambda z=z: nn.Linear(z.shape[-1], HIDDEN))(z) for which, z in (("q", x), ("k", y))
        )
        scores = query @ key.mT / 3
        if option % 2:
            scores = scores.masked_fill(~mask[: x.shape[1], : y.shape[1]], -torch.inf)
        return scores.softmax(-1) @ (key if option % 4 < 2 else y)

    def written(self, name: str, x: torch.Tensor, y: torch.Tensor, option: int, mask: torch.Tensor) -> torch.Tensor:
        """Writes into views."""
        x = x * 1
        if option == 0:
            x[:, ::2] *= 0.5
        elif option == 1:
            x.transpose(1, 2)[:, 0].add_(1.0)
        elif option == 2:
            x[:, 1:].copy_(x[:, :-1].clone().sin())
        elif option == 3:
            x[0] += y[-1, : x.shape[1], :1] if y.shape[1] >= x.shape[1] else 1.0
        elif option == 4:
            x = x.contiguous()
            x.view(BATCH, -1)[:, 0] = 0.3
        else:
            top, _ = x.topk(1, -1)
            top /= 1 + top.detach().abs().sum(1, keepdim=True)
            x = x * top
        return x

    def picked(self, name: str, x: torch.Tensor, y: torch.Tensor, option: int, mask: torch.Tensor) -> torch.Tensor:
        """Rows that a mask over batch and sequence picks."""
        chosen = torch.stack([mask[row, : x.shape[1]] for row in range(BATCH)])
        layer = self.layer(name, lambda: nn.Linear(x.shape[-1], x.shape[-1]))
        if option % 4 == 0:
            x = x * 1
            x[chosen] = layer(x[chosen]).tanh()
            return x
        if option % 4 == 1:
            row, token = torch.where(chosen)
            return x.index_put((row, token), layer(x[row, token]) * 0.1, accumulate=True)
        if option % 4 == 2:
            return x + layer(x[chosen]).sum(0) * 0.01
        return x.masked_scatter(chosen[..., None], layer(x).sin())

    def convolved(self, name: str, x: torch.Tensor, y: torch.Tensor, option: int, mask: torch.Tensor) -> torch.Tensor:
        """A causal convolution of each channel along the sequence."""
        width, size = x.shape[-1], 1 + option % 3
        layer = self.layer(name, lambda: nn.Conv1d(width, width, size, groups=width, padding=size - 1))
        return layer(x.mT)[..., : x.shape[1]].mT

    def running(self, name: str, x: torch.Tensor, y: torch.Tensor, option: int, mask: torch.Tensor) -> torch.Tensor:
        """Cumulative sums along the sequence, and sorted values."""
        if option % 3 == 0:
            return x.cumsum(1) * 0.1
        if option % 3 == 1:
            return x.flip(1).cumsum(1).flip(1).tanh()
        order = x.detach().sum(-1).argsort(1)
        put = order.argsort(1)[..., None].expand_as(x)
        return x.gather(1, order[..., None].expand_as(x)).sin().gather(1, put)

    def experts(self, name: str, x: torch.Tensor, y: torch.Tensor, option: int, mask: torch.Tensor) -> torch.Tensor:
        """Each token's own expert: weights by index, or tokens sorted by expert."""
        width = x.shape[-1]
        router = self.layer(f"{name}router", lambda: nn.Linear(width, 3))
        weights = self.layer(f"{name}experts", lambda: nn.Linear(width, 3 * width, bias=False)).weight.view(
            3, width, width
        )
        rows = x.reshape(-1, width)
        probability, chosen = router(rows).softmax(-1).max(-1)
        if option % 2:
            found = torch.einsum("td,tdf->tf", rows, weights[chosen])
        else:
            order = chosen.argsort()
            found = torch.einsum("td,tdf->tf", rows[order], weights[chosen[order]])[order.argsort()]
        return (found * probability[:, None]).view(x.shape)

    def owned(self, name: str, x: torch.Tensor, y: torch.Tensor, option: int, mask: torch.Tensor) -> torch.Tensor:
        """A custom autograd.Function."""
        if option % 2:
            return RoundedStraight.apply(x)
        return OwnNorm.apply(x, self.layer(name, lambda: nn.LayerNorm(x.shape[-1], bias=False)).weight)


class RoundedStraight(torch.autograd.Function):
    """Rounds, and lets gradients pass where entries are small."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return grad * (x.abs() < 2)


class OwnNorm(torch.autograd.Function):
    """An RMS norm as kernel libraries write it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        scale = (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return x * scale * weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight, scale = ctx.saved_tensors
        normed, by_weight = x * scale, grad * weight
        dx = scale * (by_weight - normed * (by_weight * normed).mean(-1, keepdim=True))
        return dx, (grad * normed).flatten(0, -2).sum(0)


class _Maker(Steps):
    """Makes each layer at its first use; a run of it on a meta-sized input prepares the layers of a model."""

    def layer(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        if name not in self.layers:
            self.layers[name] = make().double()
        return self.layers[name]


KINDS = (
    "unary", "linear", "norm", "flat", "across", "binary", "narrow", "joined", "reduced", "shifted", "attention",
    "spelled", "written", "picked", "convolved", "running", "experts", "owned",
)  # fmt: skip
ASKED = (
    (2, Ulysses(split="batch")), (4, Ulysses()), (3, Ulysses()), (2, Ring()), (3, Ring()), (3, AllGatherKV()),
    (2, MegatronSP()), (3, MegatronSP()),
)  # fmt: skip


Drawn = tuple[list[Step], bool, int, int, list[tuple[int, Strategy]]]


@st.composite
def _models(draw: st.DrawFn) -> Drawn:
    index = st.integers(0, 7)
    steps = draw(st.lists(st.builds(Step, st.sampled_from(KINDS), index, index, index), min_size=1, max_size=7))
    at = draw(st.integers(0, len(steps)))
    steps.insert(at, Step("attention", draw(index), draw(index), draw(index)))
    # of attention that is spelled out without heads, the batch is what counts as heads
    is_spelled = any(step.kind == "spelled" for step in steps)
    usable = [(num, each) for num, each in ASKED if not is_spelled or each != Ulysses(split="batch")]
    asked = draw(st.lists(st.sampled_from(usable), min_size=1, max_size=2, unique=True))
    return steps, draw(st.booleans()), draw(st.integers(0, 2)), draw(st.sampled_from([8, 10, 16])), asked


def check(steps: list[Step], has_embedding: bool, ending: int, length: int, asked: list[tuple[int, Strategy]]) -> None:
    """The model of these steps, as asked."""
    torch.manual_seed(0)
    model: Any = _Maker(steps, has_embedding, ending)
    if has_embedding:
        x = torch.randint(VOCAB, (BATCH, length))
    else:
        x = torch.randn(BATCH, length, HIDDEN, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2 * length, 2 * length) < 0.7
    mask[:, 0] = True
    with torch.no_grad():
        model(x, mask)
    model.__class__ = Steps
    for num_ranks, strategy in asked:
        reference, ranks, _ = on_ranks(model, x, mask, num_ranks=num_ranks, strategy=strategy)
        assert_ranks_equal_one_device(reference, ranks)


def drawn(max_examples: int) -> Callable[[Callable[..., None]], Callable[[], None]]:
    asked = settings(
        max_examples=max_examples, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
    )
    return lambda test: asked(given(_models())(test))


@drawn(4)
def test_random_models_equal_one_device(drawn: Drawn) -> None:
    check(*drawn)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@drawn(180)
def test_more_random_models_equal_one_device(drawn: Drawn) -> None:
    check(*drawn)
