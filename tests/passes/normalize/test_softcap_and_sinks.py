"""Softcaps and sinks, spelled out, become arguments of attention; what only looks like them is left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import sptransform
from sptransform.compiler.options import Options
from sptransform.compiler.rewrite import rewrite_graph
from sptransform.engine.pass_manager import run_passes
from sptransform.passes.normalize.recognize_attention import RecognizeAttention
from sptransform.sharding.mesh import Mesh
from tests.passes.capped import (
    BATCH,
    HEADS,
    HIDDEN,
    KEY_HEADS,
    LEFT,
    LENGTH,
    SPELLINGS,
    WIDTH,
    Attend,
    added_mask,
    capped_and_sunk,
    hidden_keys,
    joined,
    key_heads_repeated,
    sunk_heads_in_groups,
)
from tests.passes.masks import PASSES, RING, traced
from tests.support.equality import assert_equal_to_one_device, run_one_device
from tests.support.graphs import a_context, nodes_of, run_once, while_captured
from tests.support.models import FLOAT64
from tests.support.rewritten import Asked, on_pretended_ranks
from tests.support.tiers import tiered

aten, sp = torch.ops.aten, torch.ops.sptransform


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
    assert not attentions(ranks.graphs[0].graph_module)  # but one by position
    for result in ranks.results():
        assert_equal_to_one_device(reference, result, FLOAT64)


@pytest.mark.parametrize("attend", LEFT, ids=lambda attend: attend.__name__)
def test_what_is_something_else_is_left(attend: Attend) -> None:
    gm = run_passes(traced(attend, tensors()), [RecognizeAttention()], a_context())
    assert not attentions(gm) and not nodes_of(gm, aten.scaled_dot_product_attention.default)
    assert len(nodes_of(gm, aten.softmax.int)) == 1
