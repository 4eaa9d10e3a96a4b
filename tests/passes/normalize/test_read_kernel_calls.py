"""Calls of attention kernels become attention that every strategy places, with the values and gradients they had.

The kernels are stand-ins, see `tests/support/flash_attn_stand_in.py`: the same functions, classes and ops, on a CPU.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

import sptransform
from sptransform import UsageError
from sptransform.compiler.options import Options
from sptransform.compiler.rewrite import rewrite_graph
from sptransform.graph.printer import text
from sptransform.passes.normalize.read_kernel_calls import ReadKernelCalls
from sptransform.sharding.mesh import Mesh
from tests.passes.kernel_models import (
    HEADS,
    HIDDEN,
    LENGTH,
    OTHER_LENGTH,
    WIDTH,
    Attend,
    Model,
    assert_exact,
    tokens,
    without_lines,
)
from tests.support import flash_attn_3_stand_in as flash_attn_3
from tests.support.equality import assert_equal_to_one_device, run_one_device, worst_error
from tests.support.flash_attn_stand_in import (
    attention_of_documents,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
)
from tests.support.golden import Golden
from tests.support.graphs import after, nodes_of, while_captured
from tests.support.models import FLOAT64
from tests.support.rewritten import Asked, on_pretended_ranks
from tests.support.tiers import tiered

aten, sp = torch.ops.aten, torch.ops.sptransform


# --- one sequence, or a batch of them -----------------------------------------------------------------------------


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn_func(q, k, v)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn_func(q, k, v, causal=True, softmax_scale=0.7)


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn_func(q, k, v, window_size=(3, 1))


def earlier(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A causal window, whose second number says nothing."""
    return flash_attn_func(q, k, v, causal=True, window_size=(4, 2), deterministic=True)


def later(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn_func(q, k, v, window_size=(-1, 2))


def slanted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slopes = torch.tensor([0.5, 0.25, 0.125, 1.0])
    return flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes)


def slanted_by_sequence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slopes = torch.tensor([0.5, 0.25, 0.125, 1.0]) * torch.tensor([[1.0], [2.0]])
    return flash_attn_func(q, k, v, window_size=(5, 5), alibi_slopes=slopes)


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn_func(q, k, v, softcap=0.5)


def all_at_once(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slopes = torch.tensor([0.5, 0.25, 0.125, 1.0])
    return flash_attn_func(q, k, v, causal=True, window_size=(6, -1), softcap=0.5, alibi_slopes=slopes)


DENSE: list[Attend] = [full, causal, window, earlier, later, slanted, slanted_by_sequence, capped, all_at_once]


@pytest.mark.parametrize("attend", tiered(DENSE, quick=[causal, all_at_once]), ids=lambda attend: attend.__name__)
def test_a_call_is_exact(attend: Attend) -> None:
    assert_exact(Model(attend), {"x": tokens()})


@pytest.mark.slow
@pytest.mark.parametrize("attend", DENSE, ids=lambda attend: attend.__name__)
@pytest.mark.parametrize("lengths", [(LENGTH, OTHER_LENGTH), (OTHER_LENGTH, LENGTH)])
def test_masks_are_aligned_at_the_last_token(attend: Attend, lengths: tuple[int, int]) -> None:
    """Where there are fewer keys than queries, the first of these see nothing."""
    queries, keys = lengths
    assert_exact(Model(attend), {"x": tokens(queries), "y": tokens(keys, seed=1)})


@pytest.mark.parametrize("is_causal", [True, False])
def test_packed_projections(is_causal: bool) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            out = flash_attn_qkvpacked_func(self.qkv(x).unflatten(-1, (3, HEADS, WIDTH)), causal=is_causal)
            return (x + out.flatten(2)).square().sum(-1).sin().mean()

    assert_exact(Packed(), {"x": tokens()})


def test_what_is_plain_is_the_plain_op() -> None:
    for attend in (full, causal):
        gm, _ = after([ReadKernelCalls()], Model(attend), tokens())
        assert len(nodes_of(gm, aten.scaled_dot_product_attention.default)) == 1
        assert not nodes_of(gm, sp.ring_attention.default)


# --- documents packed into one sequence ---------------------------------------------------------------------------

# of 12 tokens on 2 and 3 ranks shards end at 6, and at 4 and 8: inside of documents, at their ends, and beyond the last
ENDS = {
    "inside": [0, 5, 7, 12],
    "at_the_edges": [0, 4, 6, 8, 12],
    "one": [0, 12],
    "empty": [0, 3, 3, 9, 12],
    "rest": [0, 2, 7],
    "single_tokens": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
}


def ends_of(name: str) -> Tensor:
    return torch.tensor(ENDS[name], dtype=torch.int32)


def by_flash(**options: Any) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, key_ends: Tensor | None = None) -> Tensor:
        key_ends = ends if key_ends is None else key_ends
        return flash_attn_varlen_func(q, k, v, ends, key_ends, LENGTH, OTHER_LENGTH, **options)

    return attend


PACKED: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "earlier": {"causal": True, "window_size": (2, 0), "softmax_scale": 0.7},
    "capped": {"causal": True, "softcap": 0.5},
    "slanted": {"causal": True, "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 1.0])},
}


@pytest.mark.covering(ways=1)
@pytest.mark.parametrize("mask", PACKED)
@pytest.mark.parametrize("name", ENDS)
def test_documents_are_exact(name: str, mask: str) -> None:
    model = Model(by_flash(**PACKED[mask]), is_packed=True)
    assert_exact(model, {"x": tokens(batch=1), "ends": ends_of(name)})


# queries and keys in documents that are shorter, longer and as long, and empty
OTHER_ENDS = {"inside": [0, 7, 9, 18], "empty": [0, 2, 6, 6, 13], "rest": [0, 9, 11]}


@pytest.mark.slow
@pytest.mark.parametrize("mask", PACKED)
@pytest.mark.parametrize("name", OTHER_ENDS)
def test_documents_of_queries_and_of_keys_are_exact(name: str, mask: str) -> None:
    model = Model(by_flash(**PACKED[mask]), is_packed=True)
    others = torch.tensor(OTHER_ENDS[name], dtype=torch.int32)
    inputs = {"x": tokens(batch=1), "y": tokens(OTHER_LENGTH, 1, seed=1), "ends": ends_of(name), "key_ends": others}
    assert_exact(model, inputs)


def test_two_tensors_of_the_same_ends_are_exact() -> None:
    model = Model(by_flash(causal=True), is_packed=True)
    ends = ends_of("inside")
    assert_exact(model, {"x": tokens(batch=1), "ends": ends, "key_ends": ends.clone()})


def test_the_comparison_sees_a_document() -> None:
    model = Model(by_flash(causal=True), is_packed=True)
    inputs = {"x": tokens(batch=1), "ends": ends_of("inside")}
    reference = run_one_device(model, inputs)
    others = inputs | {"ends": torch.tensor([0, 5, 8, 12], dtype=torch.int32)}
    (ranks,) = on_pretended_ranks(Model(by_flash(causal=True), is_packed=True), others, [Asked(2, "ring")]).values()
    assert worst_error(reference, ranks.results()[0])[1] > 1e-3


@pytest.mark.skipif("enable_gqa" not in signature(varlen_attn).parameters, reason="this torch has no enable_gqa there")
@pytest.mark.covering(ways=1)
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("name", ["inside", "rest"])
def test_torchs_own_function_is_exact(name: str, window: tuple[int, int]) -> None:
    """Its op needs a GPU: one device is the definition."""

    def attend(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Tensor:
        return varlen_attn(q, k, v, ends, ends, LENGTH, LENGTH, window_size=window, enable_gqa=True)

    def definition(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Tensor:
        return attention_of_documents(q, k, v, ends, ends, WIDTH**-0.5, False, window)

    inputs = {"x": tokens(batch=1), "ends": ends_of(name)}
    reference = run_one_device(Model(definition, is_packed=True), inputs)
    assert_exact(Model(attend, is_packed=True), inputs, reference)


@pytest.mark.parametrize(
    "options", tiered([{"causal": True, "softcap": 0.5}, {"window_size": (2, 1)}], quick=[]), ids=str
)
def test_the_third_generation_is_exact(options: dict[str, Any]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Tensor:
        return flash_attn_3.flash_attn_varlen_func(q, k, v, ends, ends, LENGTH, LENGTH, **options)

    assert_exact(Model(attend, is_packed=True), {"x": tokens(batch=1), "ends": ends_of("rest")})


def test_lengths_stay_open() -> None:
    """And the number of documents."""

    def rewritten(gm: fx.GraphModule, found: list[Any]) -> fx.GraphModule:
        return rewrite_graph(gm, found, Options(strategy="ring"), Mesh.pretended(2))[0]

    x, ends = tokens(batch=1), ends_of("inside")
    torch._dynamo.mark_dynamic(x, 1)
    torch._dynamo.mark_dynamic(ends, 0)
    model = Model(by_flash(causal=True, window_size=(4, 0)), is_packed=True)
    (attention,) = nodes_of(while_captured(model, rewritten, x=x, ends=ends), sp.ring_attention.default)
    assert isinstance(attention.meta["val"][0].shape[2], torch.SymInt)


def test_a_checkpointed_call_is_computed_again() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(lambda *x: flash_attn_func(*x, window_size=(3, 0)), q, k, v, use_reentrant=False)

    gm, _ = after([ReadKernelCalls()], Model(attend), tokens())
    (attention,) = nodes_of(gm, sp.ring_attention.default)
    assert attention.meta["recompute"] == CheckpointPolicy.PREFER_RECOMPUTE and "ac_graph_id" in attention.meta
    assert_exact(Model(attend), {"x": tokens()})


def test_two_layers_share_their_documents(golden: Golden) -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (Model(by_flash(causal=True), is_packed=True) for _ in range(2))

        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return self.first(x, ends=ends) + self.second(x, ends=ends)

    gm, _ = after([ReadKernelCalls()], Layers(), tokens(batch=1), ends_of("inside"))
    assert len(nodes_of(gm, aten.searchsorted.Tensor)) == 1
    nodes = list(gm.graph.nodes)
    (first, _) = nodes_of(gm, sp.ring_attention.default)
    golden.check("read_kernel_calls", after=text(nodes[nodes.index(first) - 15 : nodes.index(first) + 4]))


# --- what is refused ----------------------------------------------------------------------------------------------


def probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, logsumexp, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    return out * logsumexp.transpose(1, 2).unsqueeze(-1)


def probabilities_unread(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn_func(q, k, v, causal=True, return_attn_probs=True)[0]


def in_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    return flash_attn_3.flash_attn_varlen_func(q, k, v, ends, ends, LENGTH, LENGTH, attention_chunk=4)


def paged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    pages = torch.zeros(2, 1, dtype=torch.int32)
    return flash_attn_varlen_func(q, k, v, ends, ends, LENGTH, LENGTH, block_table=pages)


def slopes_of_documents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    return flash_attn_varlen_func(q, k, v, ends, ends, LENGTH, LENGTH, alibi_slopes=torch.rand(2, HEADS))


class WithoutKeyGradients(torch.autograd.Function):
    """flash-attn's kernels in a function whose gradient is not that of attention."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse, _, state = torch.ops.flash_attn._flash_attn_forward(
            q, k, v, 0.0, 1.0, causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
            return_softmax=False,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse, state)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_query, _, of_value = derived(ctx, grad)
        return of_query, None, of_value


def derived(
    ctx: Any, grad: Tensor, scale: float = 1.0, causal: bool = False, read: str = "qkvo", in_one_buffer: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's gradient; ``read`` are what it takes for query, key, value and output."""
    *saved, lse, state = ctx.saved_tensors
    named = dict(zip("qkvo", saved, strict=True))
    of_query, of_key = torch.empty_like(named["q"]), torch.empty_like(named["k"])
    results = of_query, of_key, of_key if in_one_buffer else torch.empty_like(named["v"])
    options = 0.0, scale, causal, -1, -1, 0.0, None, False
    operands = [named[name] for name in read]
    torch.ops.flash_attn._flash_attn_backward(grad, *operands, lse, *results, *options, rng_state=state)
    return results


class WithScaledGradients(WithoutKeyGradients):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_query, of_key, of_value = derived(ctx, grad)
        return of_query, of_key * 0.5, of_value


class OfAnotherScale(WithoutKeyGradients):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return derived(ctx, grad, scale=0.5)


class OfCausalAttention(WithoutKeyGradients):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return derived(ctx, grad, causal=True)


class InAnotherOrder(WithoutKeyGradients):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_query, of_key, of_value = derived(ctx, grad)
        return of_query, of_value, of_key


class Unwritten(WithoutKeyGradients):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_query, of_key, of_value = derived(ctx, grad)
        return torch.empty_like(of_query), of_key, of_value


class OfSwappedOperands(WithoutKeyGradients):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return derived(ctx, grad, read="qvko")


class Shifted(WithoutKeyGradients):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_query, of_key, of_value = derived(ctx, grad)
        return functional.pad(of_query[..., 1:], [0, 1]), of_key, of_value


class Truncated(WithoutKeyGradients):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.pad(WithoutKeyGradients.forward(ctx, q, k, v)[..., :2], [0, 1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return derived(ctx, grad)


class OfAnotherOutput(WithoutKeyGradients):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return derived(ctx, grad, read="qkvq")


class InOneBuffer(WithoutKeyGradients):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return derived(ctx, grad, in_one_buffer=True)


class Right(WithoutKeyGradients):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return derived(ctx, grad)


@pytest.mark.parametrize(
    "attend", [probabilities, paged, in_chunks, slopes_of_documents], ids=lambda attend: attend.__name__
)
def test_refused_by_name(golden: Golden, attend: Attend) -> None:
    model = Model(attend, is_packed=attend is not probabilities)
    with pytest.raises(UsageError) as caught:
        sptransform.rewrite(model, "ulysses", {"x": tokens(batch=1)}, world_size=2)
    golden.check(f"kernel_calls_{attend.__name__}", message=without_lines(str(caught.value)))


def test_what_is_returned_and_not_read_is_no_matter() -> None:
    assert_exact(Model(probabilities_unread), {"x": tokens()})


def test_a_function_of_the_users_own_is_read_if_its_gradient_is_the_kernels() -> None:
    assert_exact(Model(Right.apply), {"x": tokens()})


OTHERS = (
    WithoutKeyGradients, WithScaledGradients, OfAnotherScale, OfCausalAttention, InAnotherOrder, OfSwappedOperands,
    Shifted, Truncated, OfAnotherOutput, InOneBuffer,
)  # fmt: skip


@pytest.mark.parametrize("function", [*OTHERS, Unwritten])
def test_another_gradient_is_not_attentions(function: type[torch.autograd.Function]) -> None:
    with pytest.raises(UsageError, match="no scaled_dot_product_attention"):
        sptransform.rewrite(Model(function.apply), "ulysses", {"x": tokens()}, world_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("function", OTHERS)
def test_another_gradient_is_run_as_it_is(function: type[torch.autograd.Function]) -> None:
    model, inputs, asked = Model(function.apply), {"x": tokens()}, Asked(2, "ulysses")
    ranks = on_pretended_ranks(model, inputs, [asked], sequence_dims={"x": 1})[asked]
    (fallback,) = ranks.context.result.fallbacks
    assert function.__name__ in fallback.op
    reference = run_one_device(model, inputs)
    for result in ranks.results():
        assert_equal_to_one_device(reference, result, FLOAT64)
