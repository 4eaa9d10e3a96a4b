"""What masks are read, as bounds of a distance or as programs, and that what was read is the mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.nn import functional
from transformers import MistralConfig, MistralForCausalLM

from sptransform.capture.capture import capture
from sptransform.diagnostics.errors import UsageError
from sptransform.engine.pass_manager import run_passes
from sptransform.graph import dataflow
from sptransform.graph.printer import line, text
from sptransform.passes.normalize.attend_by_position import AttendByPosition
from sptransform.strategies.ring import Ring
from sptransform.strategies.ulysses import Ulysses
from tests.passes.masks import (
    BANDS,
    BATCH,
    DOCUMENTS,
    HEADS,
    LEARNED,
    LEARNED_WHOLE,
    LENGTH,
    PADDING,
    PASSES,
    PROGRAMS,
    RING,
    SDPA,
    WHOLE,
    Mask,
    attend,
    causal,
    heads,
    hide,
    keys,
    queries,
    read,
    same_document,
    traced,
    unmasked,
)
from tests.support.golden import Golden
from tests.support.graphs import a_context, after, captured, nodes_of, while_captured
from tests.support.models import build


@pytest.mark.parametrize("name", BANDS)
def test_distances_are_bounds(name: str) -> None:
    mask, band = BANDS[name]
    found = read(mask)
    assert (found.band, found.program) == (band, "")
    assert not found.squares
    assert not found.node.args[3] and not found.node.args[4]
    found.assert_same_mask()


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_rest_is_a_program(name: str) -> None:
    mask, inputs, band, counts = PROGRAMS[name]
    found = read(mask, *inputs)
    assert found.band == band
    assert found.program and not found.squares
    assert (len(found.node.args[3]), len(found.node.args[4])) == counts
    found.assert_same_mask()
    found.assert_same_attention()


@pytest.mark.parametrize("name", WHOLE)
def test_what_cannot_be_read_is_an_operand(name: str) -> None:
    mask, inputs, band = WHOLE[name]
    found = read(mask, *inputs)
    assert found.band == band
    assert found.program
    assert [dataflow.shape(x)[-2:] for x in found.node.args[3]].count((LENGTH, LENGTH)) == 1
    found.assert_same_mask()
    found.assert_same_attention()


def ring_context() -> Any:
    return a_context(strategy=Ring())


def test_golden(golden: Golden) -> None:
    def model(query: Tensor, key: Tensor, value: Tensor, documents: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(query, key, value, causal() & same_document(documents))

    inputs = [heads(), heads(), heads(), DOCUMENTS]
    before, _ = captured(model, *inputs)
    gm, _ = after(AttendByPosition, model, *inputs, context=ring_context())
    golden.check("attend_by_position", before=text(before.graph.nodes), after=text(gm.graph.nodes))


def test_is_causal_is_a_bound() -> None:
    found = read(None, is_causal=True, scale=0.25)
    assert (found.band, found.program, found.node.kwargs["scale"]) == ((0, None), "", 0.25)
    found.assert_same_attention()


def test_no_mask() -> None:
    found = read(None)
    assert (found.band, found.program) == ((None, None), "")
    found.assert_same_attention()


def test_dropout_is_carried_over() -> None:
    assert read(causal, dropout_p=0.25).node.kwargs["dropout_p"] == 0.25


def test_dropout_is_computed_in_tiles_where_heads_are_cut() -> None:
    """Fused kernels would drop the same on ranks of equal seeds; the definition has all queries and keys at once."""

    def model(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(query, key, value, dropout_p=0.25, is_causal=True)

    gm, _ = after(AttendByPosition, model, heads(), heads(), heads(), context=a_context(strategy=Ulysses()))
    (node,) = nodes_of(gm, torch.ops.sptransform.ring_attention.default)
    assert (node.kwargs["dropout_p"], node.kwargs["nearest"]) == (0.25, 0)


@pytest.mark.parametrize("num_keys", [4, 9])
def test_keys_of_another_length(num_keys: int) -> None:
    """Positions of queries and keys are counted from the first of each, as ``is_causal`` counts them."""

    def model(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = torch.arange(num_keys) <= queries() + 1
        return functional.scaled_dot_product_attention(query, key, value, mask)

    inputs = [heads(), heads(length=num_keys), heads(length=num_keys)]
    gm = run_passes(traced(model, inputs), PASSES, ring_context())
    (node,) = nodes_of(gm, RING)
    assert (node.kwargs["nearest"], node.kwargs["farthest"], node.kwargs["mask"]) == (-1, None, "")
    torch.testing.assert_close(gm(*inputs)[0], model(*inputs))


def test_key_heads_that_are_not_repeated() -> None:
    def model(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        return functional.scaled_dot_product_attention(query, key, value, causal())

    inputs = [heads(4), heads(2), heads(2)]
    gm = run_passes(traced(model, inputs), PASSES, ring_context())
    (node,) = nodes_of(gm, RING)
    assert [dataflow.shape(x)[1] for x in node.args[:3]] == [4, 2, 2]
    torch.testing.assert_close(gm(*inputs)[0], model(*inputs))


def test_layers_share_what_they_read() -> None:
    def model(query: Tensor, key: Tensor, value: Tensor, documents: Tensor, bias: Tensor) -> Tensor:
        mask = causal() & same_document(documents).transpose(1, 0).transpose(0, 1)
        for _ in range(3):
            query = functional.scaled_dot_product_attention(query, key, value, mask)
        return functional.scaled_dot_product_attention(query, key, value, mask & unmasked(documents))

    inputs = [heads(), heads(), heads(), DOCUMENTS, torch.ones(())]
    gm = run_passes(traced(model, inputs), PASSES, ring_context())
    first, second, third, other = nodes_of(gm, RING)
    assert first.args[3:5] == second.args[3:5] == third.args[3:5]
    assert first.kwargs == second.kwargs == third.kwargs != other.kwargs
    assert set(first.args[3]) == set(other.args[3])
    torch.testing.assert_close(gm(*inputs)[0], model(*inputs))


def test_other_readers_keep_the_mask() -> None:
    def model(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        mask = causal()
        return functional.scaled_dot_product_attention(query, key, value, mask), mask.sum()

    inputs = [heads(), heads(), heads()]
    gm = run_passes(traced(model, inputs), PASSES, ring_context())
    torch.testing.assert_close(gm(*inputs)[0], model(*inputs))


def test_chance_is_no_constant() -> None:
    """What is drawn anew at every run is an operand."""
    found = read(lambda: causal() & (torch.rand(LENGTH) < 2.0))
    assert found.band == (0, None) and found.program


def test_what_is_larger_than_the_queries_is_not_computed() -> None:
    """A position that only a large tensor tells is an operand: compiling takes no more memory than running."""

    def model(query: Tensor, key: Tensor, value: Tensor, table: int) -> Tensor:
        positions = torch.arange(table)[:LENGTH]
        return functional.scaled_dot_product_attention(query, key, value, positions <= positions[:, None])

    for table, expected in ((BATCH * HEADS * LENGTH * 4, ""), (BATCH * HEADS * LENGTH * 4 + 1, "le.Tensor")):
        gm = run_passes(traced(lambda *x, n=table: model(*x, n), [heads(), heads(), heads()]), PASSES, ring_context())
        (node,) = nodes_of(gm, RING)
        assert expected in node.kwargs["mask"] and bool(expected) == bool(node.kwargs["mask"])


@pytest.mark.parametrize("name", LEARNED)
def test_a_mask_with_a_gradient_is_a_program(name: str) -> None:
    mask, inputs, band, counts, program = LEARNED[name]
    found = read(mask, *inputs)
    assert found.band == band and not found.squares
    operands = found.operands
    assert tuple(map(len, operands)) == counts
    assert program is None or found.program == program
    assert all(dataflow.shape(table)[0] in (1, HEADS) for table in operands[2])
    found.assert_same_mask()
    found.assert_same_attention()


@pytest.mark.parametrize("name", LEARNED_WHOLE)
def test_what_cannot_be_read_has_its_gradient_too(name: str) -> None:
    mask, inputs = LEARNED_WHOLE[name]
    found = read(mask, *inputs)
    rows, *_ = found.operands
    assert [dataflow.shape(x)[-2:] for x in rows].count((LENGTH, LENGTH)) == 1
    found.assert_same_mask()
    found.assert_same_attention()


def of_heads(mask: Mask, inputs: list[Tensor]) -> fx.GraphModule:
    """What the pass makes of a mask where queries and keys are not cut."""
    all_inputs = [heads(), heads(), heads(), *inputs]
    return run_passes(traced(lambda *x: attend(mask, *x), all_inputs), PASSES, a_context())


def test_a_mask_with_a_gradient_is_read_where_queries_are_not_cut_too() -> None:
    mask, inputs, *_ = LEARNED["heads last"]
    assert nodes_of(of_heads(mask, inputs), RING)
    for name in ("a learned tensor", "a padding index"):
        mask, inputs = LEARNED_WHOLE[name]
        gm = of_heads(mask, inputs)
        assert nodes_of(gm, SDPA) and not nodes_of(gm, RING)


@pytest.mark.parametrize(
    "inputs",
    [
        [heads()[0], heads()[0], heads()[0]],  # no dimension for heads
        [heads(length=1), heads(), heads()],  # one query: nothing to split
        [heads()[:1], heads(), heads()],  # several batches of keys share a query
        [heads(), heads()[:1], heads()[:1]],
    ],
    ids=["no heads", "one query", "one batch of queries", "one batch of keys"],
)
def test_other_layouts_are_left_alone(inputs: list[Tensor]) -> None:
    gm = run_passes(traced(functional.scaled_dot_product_attention, inputs), PASSES, ring_context())
    assert nodes_of(gm, SDPA) and not nodes_of(gm, RING)


def test_an_op_that_passes_no_gradient_is_refused(golden: Golden) -> None:
    """Where queries are cut; elsewhere the mask is left. It is no matter beside the way of a gradient."""

    def model(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
        bias = torch.erf(table[(queries() - keys()).abs()])
        return functional.scaled_dot_product_attention(query, key, value, bias)

    inputs = [heads(), heads(), heads(), torch.zeros(LENGTH, dtype=torch.float64, requires_grad=True)]
    with pytest.raises(UsageError) as caught:
        after(AttendByPosition, model, *inputs, context=ring_context())
    golden.check("errors_mask_gradient", message=str(caught.value))
    gm = run_passes(traced(model, inputs), PASSES, a_context())
    assert nodes_of(gm, SDPA) and not nodes_of(gm, RING)
    inputs[3].requires_grad_(False)
    after(AttendByPosition, model, *inputs, context=ring_context())


def test_autocast_rounds_what_is_added_to_scores() -> None:
    """The lowest number of float32 is -inf in bfloat16: it hides then, and only then."""
    lowest = torch.finfo(torch.float32).min

    def model(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = torch.zeros(LENGTH, LENGTH).masked_fill(keys() >= queries(), lowest)
        with torch.autocast("cpu", torch.bfloat16):
            return functional.scaled_dot_product_attention(query, key, value, mask)

    inputs = [heads(dtype=torch.float32) for _ in range(3)]
    gm = run_passes(traced(model, inputs), PASSES, ring_context())
    (node,) = nodes_of(gm, RING)
    assert (node.kwargs["nearest"], node.kwargs["mask"]) == (1, "")
    assert not model(*inputs)[:, :, 0].any()
    torch.testing.assert_close(gm(*inputs)[0], model(*inputs), rtol=2e-2, atol=2e-2)


def packed() -> tuple[Any, dict[str, Tensor]]:
    model, inputs = build("llama_nocache", seq_len=24)
    positions = torch.cat([torch.arange(15), torch.arange(9)])[None].expand(2, -1)
    return model, {**inputs, "position_ids": positions.contiguous()}


def window() -> tuple[Any, dict[str, Tensor]]:
    _, inputs = build("llama_nocache", seq_len=24)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = MistralConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, sliding_window=8)
    return MistralForCausalLM(config).double(), {**inputs, "use_cache": False}


HUGGING_FACE: dict[str, tuple[Callable[[], Any], tuple[int | None, int | None], str]] = {
    "llama, no cache": (lambda: build("llama_nocache", seq_len=24), (0, None), ""),
    "llama, padded": (lambda: build("llama_padded", seq_len=24), (0, None), "%0"),
    "llama, packed": (
        packed,
        (None, None),
        "%4 = le.Tensor(%2, %0); %5 = eq.Tensor(%1, %3); %6 = logical_and(%4, %5)",
    ),
    "mistral": (window, (0, 7), ""),
    "bert, padded": (lambda: build("bert", seq_len=24), (None, None), "%0"),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_models(name: str) -> None:
    make, band, program = HUGGING_FACE[name]
    model, inputs = make()

    def use(gm: fx.GraphModule, real: list[Any]) -> fx.GraphModule:
        return run_passes(capture(gm, real), PASSES, ring_context())

    gm = while_captured(model, use, **inputs)
    attentions = nodes_of(gm, RING)
    assert len(attentions) == 2 and not nodes_of(gm, SDPA)
    for node in attentions:
        assert (node.kwargs["nearest"], node.kwargs["farthest"], node.kwargs["mask"]) == (*band, program), line(node)
        assert node.args[3:5] == attentions[0].args[3:5]
    tensors = [node for node in gm.graph.nodes if dataflow.is_tensor(node)]
    assert not [line(node) for node in tensors if dataflow.shape(node)[-2:] == (24, 24)]


# random masks: of positions, padding and documents
_OFFSETS = st.integers(-3, 3)


def _position(row: bool, inputs: list[Tensor], kind: int, offset: int) -> Tensor:
    padding, documents, of_queries = inputs
    everywhere = [queries() if row else keys(), queries().clamp(max=3) if row else keys().clamp(min=2)]
    data = documents[:, None, :, None] if row else documents[:, None, None]
    flags = of_queries[:, None, :, None] if row else padding[:, None, None]
    return [*everywhere, -everywhere[0], everywhere[0].float(), data, flags][kind] + offset


@st.composite
def _comparisons(draw: st.DrawFn) -> Any:
    kinds, offsets = draw(st.tuples(*[st.integers(0, 5)] * 2)), draw(st.tuples(_OFFSETS, _OFFSETS))
    sides = draw(st.sampled_from([(True, False), (False, True), (True, True), (False, False)]))
    how = draw(st.sampled_from([torch.le, torch.gt, torch.eq, torch.ne, torch.ge, _close]))
    return lambda x: how(*(_position(s, x, k, o) for s, k, o in zip(sides, kinds, offsets, strict=True)))


def _close(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs() <= 2


def _combined(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    how = st.sampled_from([torch.logical_and, torch.logical_or, torch.bitwise_and, torch.Tensor.__and__, torch.ne])
    pairs = st.tuples(how, parts, parts).map(lambda x: lambda inputs: x[0](x[1](inputs), x[2](inputs)))
    return pairs | parts.map(lambda part: lambda inputs: ~part(inputs)) | pairs


_BOOLEANS = st.recursive(_comparisons(), _combined, max_leaves=6)
_ADDED = [
    lambda m: m,
    hide,
    lambda m: torch.where(m, -math.inf, 0.0).double(),
    lambda m: hide(m) + (queries() - keys()) * 0.5,
    lambda m: ((queries() - keys()) * 0.5).double().masked_fill(m, -math.inf) + hide(causal()),
    lambda m: m.double() - 1.0,
]


@settings(max_examples=25, deadline=None, database=None)
@given(_BOOLEANS, st.sampled_from(_ADDED))
def test_random_masks(mask: Any, form: Any) -> None:
    def whole(*inputs: Tensor) -> Tensor:
        return form(mask(inputs)).expand(BATCH, 1, LENGTH, LENGTH)

    found = read(whole, PADDING, DOCUMENTS, PADDING.flip(1))
    assert not found.squares
    found.assert_same_mask()
