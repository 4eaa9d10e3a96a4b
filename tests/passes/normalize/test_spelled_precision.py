"""Attention spelled out keeps the precision, the gradients and the extent that its spelling had."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sptransform.graph import dataflow
from sptransform.passes.normalize.recognize_attention import RecognizeAttention
from tests.passes.normalize.test_recognize_attention import BATCH, HEADS, HIDDEN, LENGTH, WIDTH, attentions
from tests.support.equality import assert_equal_to_one_device, run_one_device, worst_error
from tests.support.graphs import after
from tests.support.models import FLOAT64
from tests.support.rewritten import Asked, on_pretended_ranks

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Model(nn.Module):
    """Attention of a dtype; with ``beside``, another one that is no spelling tells what the sequence is."""

    def __init__(self, attend: Attend, dtype: torch.dtype = torch.float64, beside: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend, self.beside = attend, beside
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(BATCH, -1, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        y = self.attend(q, k, v)
        if self.beside:
            y = y + functional.scaled_dot_product_attention(q, k, v)
        return y.double().square().sum(-1).sin().mean()


def inputs(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"x": torch.randn(BATCH, LENGTH, HIDDEN, dtype=torch.float64, generator=generator).to(dtype)}


def errors(model: Model, given: dict[str, Tensor], *asked: Asked) -> list[float]:
    reference = run_one_device(model, given)
    ranks = on_pretended_ranks(model, given, list(asked)).values()
    return [worst_error(reference, result)[1] for each in ranks for result in each.results()]


def hidden() -> Tensor:
    """Of a row all keys."""
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1) | (torch.arange(LENGTH)[:, None] == 3)


def added_in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The number is -inf in 16 bits: a row of which all keys have it would be zeros, and not a mean."""
    mask = torch.zeros(LENGTH, LENGTH).masked_fill(hidden(), torch.finfo(torch.float32).min)
    return ((q @ k.mT).float() * 0.5 + mask).softmax(-1).to(v.dtype) @ v


def added_in_float64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(LENGTH, LENGTH, dtype=torch.float64).masked_fill(hidden(), torch.finfo(torch.float64).min)
    return ((q @ k.mT).double() * 0.5 + mask).softmax(-1).to(v.dtype) @ v


def bias_of_many_digits(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.arange(LENGTH).float() / LENGTH - 1000
    return ((q @ k.mT).float() * 0.5 + bias).softmax(-1).to(v.dtype) @ v


def beyond_16_bits(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q * 300, k * 300
    scores = torch.einsum("bhqd,bhkd->bhqk", q.float(), k.float()) * (1 / 90000)
    scores = scores + torch.zeros(LENGTH, LENGTH).masked_fill(hidden().tril(), -1.0)
    return scores.softmax(-1).to(v.dtype) @ v


@pytest.mark.parametrize(
    ("attend", "dtype", "tolerance"),
    [
        (added_in_float32, torch.bfloat16, 3e-2),
        (added_in_float32, torch.float16, 3e-3),
        (added_in_float64, torch.float32, 1e-6),
        (bias_of_many_digits, torch.bfloat16, 3e-2),
        (beyond_16_bits, torch.float16, 5e-3),
    ],
)
def test_what_is_added_keeps_its_dtype(attend: Attend, dtype: torch.dtype, tolerance: float) -> None:
    asked = Asked(2, "ulysses"), Asked(3, "ring")
    assert max(errors(Model(attend, dtype), inputs(dtype), *asked)) < tolerance


def cast_without_gradients(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        keys = k.float()
    scores = torch.einsum("bhqd,bhkd->bhqk", q.float(), keys) * 0.5
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1).to(v.dtype), v)


def repeated_without_gradients(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        keys = k[:, :2].repeat_interleave(2, 1)
    return functional.scaled_dot_product_attention(q, keys, v[:, :2].repeat_interleave(2, 1))


@pytest.mark.parametrize("attend", [cast_without_gradients, repeated_without_gradients])
def test_constants_get_no_gradient(attend: Attend) -> None:
    assert max(errors(Model(attend), inputs(), Asked(2, "ulysses"), Asked(3, "ring"))) < 1e-5


def in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unflatten(2, (3, 4)) for x in (q, k, v))
    return ((q @ k.mT * 0.5).softmax(-1) @ v).flatten(2, 3)


def among_channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(-2, -1) for x in (q, k, v))
    return ((q @ k.mT).softmax(-1) @ v).transpose(-2, -1)


def among_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2)


def over_landmarks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = (x.unflatten(2, (3, 4)).mean(3) for x in (k, v))
    return (q @ keys.mT).softmax(-1) @ values


@pytest.mark.parametrize("attend", [in_blocks, among_channels, among_heads, over_landmarks])
def test_attention_that_is_not_among_tokens_is_an_op_like_others(attend: Attend) -> None:
    """It has no sequence to split, and needs none of its own where other attention tells what is one."""
    model = Model(attend, beside=True)
    gm, _ = after([RecognizeAttention()], model, inputs()["x"])
    assert len(attentions(gm)) == 1
    assert max(errors(model, inputs(), Asked(2, "ulysses"), Asked((2, 2), "usp"))) < 1e-12


def of_the_best(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * 0.5
    return scores.masked_fill(scores < scores.topk(4, -1).values[..., -1:], float("-inf")).softmax(-1) @ v


def test_a_mask_of_scores_is_sent_without_a_gradient() -> None:
    model = Model(of_the_best, beside=True)
    reference = run_one_device(model, inputs())
    (ranks,) = on_pretended_ranks(model, inputs(), [Asked((2, 2), "usp")]).values()
    for result in ranks.results():
        assert_equal_to_one_device(reference, result, FLOAT64)


@pytest.mark.parametrize("is_whole", [False, True])
def test_a_fill_may_be_a_tensor(is_whole: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT / torch.full((1,), 2.0, dtype=q.dtype)
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        fill = torch.full_like(scores, float("-inf")) if is_whole else torch.tensor(float("-inf"), dtype=q.dtype)
        return torch.where(mask, scores, fill).softmax(-1) @ v

    gm, _ = after([RecognizeAttention()], Model(attend), inputs()["x"])
    assert len(attentions(gm)) == 1
    assert max(errors(Model(attend), inputs(), Asked(2, "ulysses"))) < 1e-12


def filled_with_the_lowest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    ahead = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    return (q @ k.mT * 0.5).masked_fill(ahead, torch.finfo(q.dtype).min).softmax(-1) @ v


def test_the_lowest_number_is_no_square_where_every_query_sees_its_own_key() -> None:
    """It hides as -inf does, so this is causal attention, and nothing asks which rows see no key."""
    model = Model(filled_with_the_lowest)
    for ranks in on_pretended_ranks(model, inputs(), [Asked(2, "ulysses"), Asked(2, "ring")]).values():
        nodes = [node for node in ranks.graphs[0].graph_module.graph.nodes if dataflow.is_tensor(node)]
        assert not [node.name for node in nodes if dataflow.value(node).dtype == torch.bool]
    assert max(errors(model, inputs(), Asked(2, "ulysses"), Asked(3, "ring"))) < 1e-12
