"""flex_attention under every strategy: no tensor of queries x keys, with the values and gradients of its definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import sptransform
from sptransform.diagnostics.errors import CaptureError
from sptransform.graph import dataflow
from sptransform.passes.normalize.read_score_masks import ReadScoreMasks
from tests.passes.kernel_models import (
    BATCH,
    HEADS,
    LENGTH,
    OTHER_LENGTH,
    WIDTH,
    Attend,
    Model,
    assert_exact,
    tokens,
    without_lines,
)
from tests.support.equality import run_one_device
from tests.support.golden import Golden
from tests.support.graphs import after, nodes_of
from tests.support.tiers import tiered

DOCUMENTS = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3, [0] * 2 + [1] * 10])
PREFIX = torch.tensor([3, 5])
SLOPES = torch.tensor([0.5, 0.25, 0.125, 1.0], dtype=torch.float64)
TABLE = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
FLAG = torch.tensor(True)
SINKS = torch.tensor([[True] * 2 + [False] * 10] * HEADS)
Mod = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _gradients_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """flex_attention refuses gradients on a CPU, where it has no kernel for them. Here none of its kernels runs."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    yield


# --- what a query sees --------------------------------------------------------------------------------------------


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) & (q - k < 4)


def document(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (DOCUMENTS[b, q] == DOCUMENTS[b, k]) & (q >= k)


def prefix(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) | (k < PREFIX[b])


def chunks(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q // 5 == k // 5) & ~((q + h) % 7 == 3)


def of_head(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return torch.where(h < 2, (q - k).abs() <= 2, SINKS[h, k])


def flagged(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return FLAG | (q >= k)


# --- what becomes of a score --------------------------------------------------------------------------------------


def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return torch.tanh(score / 0.5) * 0.5


def slanted(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score - SLOPES[h] * (q - k).abs().double()


def capped_and_slanted(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return 0.7 * torch.tanh(score * 2.0) + SLOPES[h] * (k - q)


def by_distance(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score + TABLE[(q - k).clamp(-4, 4) + 4]


def hidden(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    score = torch.where(q >= k, score, -float("inf"))
    return torch.where(DOCUMENTS[b, q] != DOCUMENTS[b, k], -float("inf"), score) * 1.5


@dataclass(frozen=True)
class Flex:
    """The two functions of a call."""

    mask_mod: Mod | None = None
    score_mod: Mod | None = None

    def __str__(self) -> str:
        return "-".join(mod.__name__ for mod in (self.mask_mod, self.score_mod) if mod is not None) or "plain"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask | None = None) -> Tensor:
        """By flex_attention; the blocks are made in the forward, or outside of it."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if blocks is None and self.mask_mod is not None:
            blocks = create_block_mask(self.mask_mod, BATCH, HEADS, q.shape[2], k.shape[2], device="cpu")
        return flex_attention(q, k, v, self.score_mod, blocks, enable_gqa=True).transpose(1, 2)

    def definition(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Score by score."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = q @ k.mT * WIDTH**-0.5
        changed = []
        for index in torch.cartesian_prod(*(torch.arange(size) for size in scores.shape)):
            score = scores[tuple(index)]
            score = score if self.score_mod is None else self.score_mod(score, *index)
            sees = self.mask_mod is None or bool(self.mask_mod(*index))
            changed.append(score if sees else torch.full_like(score, -float("inf")))
        weights = torch.softmax(torch.stack(changed).view(scores.shape), -1).nan_to_num(0.0)
        return (weights @ v).transpose(1, 2)


CALLS = [
    Flex(), Flex(causal), Flex(window), Flex(document), Flex(prefix), Flex(chunks), Flex(of_head), Flex(flagged),
    Flex(None, capped), Flex(causal, slanted), Flex(document, capped_and_slanted), Flex(causal, by_distance),
    Flex(None, hidden),
]  # fmt: skip


@pytest.mark.parametrize("call", tiered(CALLS, quick=[CALLS[3], CALLS[10], CALLS[11]]), ids=str)
def test_a_call_is_exact(call: Flex) -> None:
    reference = run_one_device(Model(call.definition), {"x": tokens()})
    assert_exact(Model(call.attend), {"x": tokens()}, reference)


@pytest.mark.slow
@pytest.mark.parametrize("call", [Flex(causal), Flex(window, slanted)], ids=str)
def test_masks_begin_at_the_first_token(call: Flex) -> None:
    inputs = {"x": tokens(), "y": tokens(OTHER_LENGTH, seed=1)}
    assert_exact(Model(call.attend), inputs, run_one_device(Model(call.definition), inputs))


@pytest.mark.parametrize("call", [Flex(document), Flex(None, slanted)], ids=str)
def test_blocks_made_outside_are_exact(call: Flex) -> None:
    """Of blocks that are an input only the function counts."""
    reference = run_one_device(Model(call.definition), {"x": tokens()})
    blocks = None
    if call.mask_mod is not None:
        blocks = create_block_mask(call.mask_mod, BATCH, None, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=4)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return call.attend(q, k, v, blocks)

    assert_exact(Model(attend), {"x": tokens()}, reference)


@pytest.mark.parametrize("call", [call for call in CALLS if call.mask_mod is not of_head], ids=str)
def test_nothing_has_queries_and_keys(call: Flex) -> None:
    gm, _ = after([ReadScoreMasks()], Model(call.attend), tokens(), tokens(OTHER_LENGTH))
    (attention,) = nodes_of(gm, torch.ops.sptransform.ring_attention.default)
    shapes = [shape for node in gm.graph.nodes for shape in dataflow.shapes(node)]
    assert all(shape[-2:] != (LENGTH, OTHER_LENGTH) for shape in shapes)
    assert (attention.kwargs.get("nearest") == 0) == (call.mask_mod in (causal, window, document) or call is CALLS[-1])


# --- what is refused ----------------------------------------------------------------------------------------------


def with_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, logsumexp = flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True, return_lse=True)
    return (out * logsumexp.unsqueeze(-1)).transpose(1, 2)


def squared(score: Tensor, *index: Tensor) -> Tensor:
    return score * score


def forgotten(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return SLOPES[h] * (q - k)


def summed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q.sum() >= k


def largest(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q.max() >= k


def twice(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return torch.where(q >= k, score, score * 0.5)


def filled(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return torch.where(q >= k, score, -1e4)


def slanted_then_capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return torch.tanh(score + (q - k))


def learned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = q.mean((0, 2, 3))

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + bias[k]

    return Flex(None, score_mod).attend(q, k, v)


def blocks_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    number, index = torch.ones(1, 1, 3, dtype=torch.int32), torch.arange(3, dtype=torch.int32).view(1, 1, 3, 1)
    blocks = BlockMask.from_kv_blocks(number, index, BLOCK_SIZE=4, seq_lengths=(LENGTH, LENGTH))
    return Flex().attend(q, k, v, blocks)


REFUSED: dict[str, Attend] = {
    "logsumexp": with_logsumexp,
    "squared": Flex(None, squared).attend,
    "forgotten": Flex(None, forgotten).attend,
    "summed": Flex(summed).attend,
    "learned": learned,
    "blocks": blocks_alone,
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(golden: Golden, name: str) -> None:
    # since torch 2.15 torch itself refuses scores that are forgotten, where a backward would follow
    with torch.set_grad_enabled(name != "forgotten"), pytest.raises(CaptureError) as caught:
        sptransform.rewrite(Model(REFUSED[name]), "ulysses", {"x": tokens()}, world_size=2)
    golden.check(f"flex_attention_{name}", message=without_lines(str(caught.value)))


@pytest.mark.parametrize(
    "call", [Flex(largest), Flex(None, twice), Flex(None, filled), Flex(None, slanted_then_capped)], ids=str
)
def test_what_cannot_be_read_is_refused(call: Flex) -> None:
    with pytest.raises(CaptureError, match="that cannot be read for all of them at once"):
        sptransform.rewrite(Model(call.attend), "ulysses", {"x": tokens()}, world_size=2)


def test_a_logsumexp_that_nothing_reads_is_no_matter() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options: dict[str, Any] = {"enable_gqa": True, "return_lse": True}
        return flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), **options)[0].transpose(1, 2)

    assert_exact(Model(attend), {"x": tokens()}, run_one_device(Model(Flex().definition), {"x": tokens()}))
