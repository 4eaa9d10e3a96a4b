"""Softcaps and sinks, spelled out, become arguments of attention; what only looks like them is left."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import sptransform
from sptransform.compiler.options import Options
from sptransform.compiler.rewrite import rewrite_graph
from sptransform.engine.pass_manager import run_passes
from sptransform.passes.normalize.recognize_attention import RecognizeAttention
from sptransform.sharding.mesh import Mesh
from tests.passes.masks import PASSES, RING, traced
from tests.support.equality import assert_equal_to_one_device, run_one_device
from tests.support.graphs import a_context, nodes_of, run_once, while_captured
from tests.support.models import FLOAT64
from tests.support.rewritten import Asked, on_pretended_ranks
from tests.support.tiers import tiered

aten, sp = torch.ops.aten, torch.ops.sptransform
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


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, HEADS, LENGTH, WIDTH)] * 3 + [(HEADS,)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def assert_same_run(before: fx.GraphModule, gm: fx.GraphModule) -> None:
    reference, found = run_once(before, tensors()), run_once(gm, tensors())
    torch.testing.assert_close(found.outputs, reference.outputs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.grads, reference.grads, rtol=1e-12, atol=1e-12)


def attentions(gm: fx.GraphModule) -> list[fx.Node]:
    return nodes_of(gm, sp.attention.default)


@pytest.mark.parametrize("attend", SPELLINGS, ids=lambda attend: attend.__name__)
def test_a_spelling_is_read(attend: Attend) -> None:
    """As ``sptransform.attention`` first, and then as ``ring_attention``, also where no strategy reads masks."""
    softcap, scale, has_sinks = SPELLINGS[attend]
    before = traced(attend, tensors())
    gm = run_passes(traced(attend, tensors()), [RecognizeAttention()], a_context())
    (node,) = attentions(gm)
    assert node.kwargs["softcap"] == pytest.approx(softcap) and node.kwargs["scale"] == pytest.approx(scale)
    assert ("sinks" in node.kwargs) == has_sinks and not nodes_of(gm, aten.softmax.int)
    assert_same_run(before, gm)
    gm = run_passes(traced(attend, tensors()), PASSES, a_context())
    assert len(nodes_of(gm, RING)) == 1
    assert_same_run(before, gm)


def test_sinks_of_heads_in_groups() -> None:
    gm = run_passes(traced(sunk_heads_in_groups, tensors()), PASSES, a_context())
    assert len(nodes_of(gm, RING)) == 2
    assert_same_run(traced(sunk_heads_in_groups, tensors()), gm)


def test_key_heads_are_read_as_they_are() -> None:
    gm = run_passes(traced(key_heads_repeated, tensors()), PASSES, a_context())
    (node,) = nodes_of(gm, RING)
    assert [x.meta["val"].shape[1] for x in node.args[:3]] == [HEADS, KEY_HEADS, KEY_HEADS]
    assert node.kwargs["nearest"] == 0 and node.kwargs["mask"] == ""


def test_the_op_of_one_rank_is_the_definition() -> None:
    q, k, v, s = tensors()
    for mask, is_causal in ((added_mask(), False), (~hidden_keys(), False), (None, True)):
        found = sp.attention(q, k, v, mask, 0.0, is_causal, s * 2.0, scale=0.5, softcap=1.2)
        torch.testing.assert_close(found, capped_and_sunk(q, k, v, s), rtol=1e-12, atol=1e-12)


def test_a_rank_without_queries_has_gradients() -> None:
    """All ranks sum the gradient of the sinks, so each has to have one."""
    q, k, v, s = tensors()
    out = sp.attention(q[:0], k[:0], v[:0], None, 0.0, False, s, softcap=1.2)
    grads = torch.autograd.grad(out.sum(), [q, k, v, s])
    assert out.shape == (0, HEADS, LENGTH, WIDTH) and all(grad.count_nonzero() == 0 for grad in grads)


def open_length(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    scores = torch.tanh(torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.5) * 2.0
    sinks = s.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ v


def test_lengths_stay_open() -> None:
    def rewritten(gm: fx.GraphModule, found: list[object]) -> fx.GraphModule:
        return rewrite_graph(gm, found, Options(), Mesh.pretended(2))[0]

    x = inputs()["x"]
    torch._dynamo.mark_dynamic(x, 1)
    (attention,) = nodes_of(while_captured(Model(open_length), rewritten, x), RING)
    assert isinstance(attention.args[0].meta["val"].shape[2], torch.SymInt)


# --- on ranks -----------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """One attention, spelled somehow, and a loss."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend = attend
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.sinks = nn.Parameter(torch.randn(HEADS))
        self.bias = nn.Parameter(torch.randn(HEADS, LENGTH, LENGTH))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).view(BATCH, -1, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        y = self.attend(*parts, self.sinks).transpose(1, 2).reshape(BATCH, -1, HIDDEN)
        return (x + self.out(y)).square().sum(-1).sin().mean()


def inputs() -> dict[str, Tensor]:
    return {"x": torch.randn(BATCH, LENGTH, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}


STRATEGIES = [
    Asked(2, "ulysses"),
    Asked(3, "ulysses"),  # four heads
    Asked(3, sptransform.Ulysses(split="batch")),  # a rank has nothing
    Asked(3, "ring"),
    Asked(2, sptransform.Ring(layout="contiguous")),
    Asked(2, "allgather"),
    Asked(2, "megatron"),
    Asked((2, 2), "usp"),
]


@pytest.mark.parametrize("attend", tiered(SPELLINGS, quick=[capped_and_sunk, key_heads_repeated]))
def test_ranks_have_the_gradients_of_one_device(attend: Attend) -> None:
    """That of the sinks is a sum over ranks that have other queries or another batch, and a part of other heads."""
    reference = run_one_device(Model(attend), inputs())
    for asked, ranks in on_pretended_ranks(Model(attend), inputs(), STRATEGIES).items():
        assert ranks.context.result.fallbacks == [], asked
        for result in ranks.results():
            assert_equal_to_one_device(reference, result, FLOAT64)


def test_what_it_costs_is_what_attention_costs() -> None:
    """Two all-to-alls forward and two backward; in the backward, the few gradients of sinks."""
    page = sptransform.explain(Model(capped_and_sunk), "ulysses", inputs(), world_size=2)
    kinds = [(x.direction, x.kind) for x in page.collectives if x.kind not in ("all_reduce", "all_gather")]
    assert kinds == [("forward", "all_to_all")] * 2 + [("backward", "all_to_all")] * 2
    gathers = [(x.direction, x.bytes_sent) for x in page.collectives if x.kind == "all_gather"]
    assert gathers == [("backward", HEADS // 2 * 8)]
    assert page.gathered == () and page.fallbacks == ()


def test_a_ring_merges_sinks_once() -> None:
    page = sptransform.explain(Model(capped_and_sunk), "ring", inputs(), world_size=2, expand=True)
    (ring,) = page.expanded
    assert sum("sptransform.merge_sinks(" in step for step in ring.forward) == 1
    assert not any("merge_sinks" in step for step in ring.backward)
    blocks = [step for step in (*ring.forward, *ring.backward) if "attention_block" in step]
    assert len(blocks) > 2 and all("softcap=1.2" in step for step in blocks)
    assert page.rings[0].kernel == "PyTorch reference"


class UnderALearnedMask(Model):
    """Which leaves the softmax where masks are read by position; elsewhere the gradient of the mask needs it whole."""

    def __init__(self) -> None:
        super().__init__(lambda q, k, v, s: joined(torch.tanh(q @ k.mT) + self.bias, s).softmax(-1)[..., :-1] @ v)


def test_a_mask_that_is_learned_is_exact() -> None:
    reference = run_one_device(UnderALearnedMask(), inputs())
    (ranks,) = on_pretended_ranks(UnderALearnedMask(), inputs(), [Asked(2, "ulysses")]).values()
    assert len(attentions(ranks.graphs[0].graph_module)) == 1
    for result in ranks.results():
        assert_equal_to_one_device(reference, result, FLOAT64)


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


@pytest.mark.parametrize("attend", LEFT, ids=lambda attend: attend.__name__)
def test_what_is_something_else_is_left(attend: Attend) -> None:
    gm = run_passes(traced(attend, tensors()), [RecognizeAttention()], a_context())
    assert not attentions(gm) and not nodes_of(gm, aten.scaled_dot_product_attention.default)
    assert len(nodes_of(gm, aten.softmax.int)) == 1
