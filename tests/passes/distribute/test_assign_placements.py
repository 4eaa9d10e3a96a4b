"""Every tensor is placed; what cannot be placed is said with names and fixes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from sptransform.diagnostics.errors import SPTransformError, UnsupportedOpError, UsageError
from sptransform.graph import dataflow, notes
from sptransform.graph.printer import text
from sptransform.passes.distribute.assign_placements import AssignPlacements
from sptransform.sharding.placement import I, R, Shard
from sptransform.strategies.ulysses import Ulysses
from tests.passes.blocks import Attention, by_repeat_interleave, heads, hidden_states
from tests.support.golden import Golden
from tests.support.graphs import a_context, after, assert_ranks_equal_one_device, nodes_of, on_ranks


def test_golden(golden: Golden) -> None:
    gm, _ = after(AssignPlacements, Attention(by_repeat_interleave), hidden_states())
    golden.check("assign_placements", after=text(gm.graph.nodes))


def test_parameters_are_invariant_and_replicated_without_gradient_sync() -> None:
    for grad_sync, expected in ((True, I), (False, R)):
        gm, _ = after(AssignPlacements, Attention(), hidden_states(), context=a_context(grad_sync=grad_sync))
        inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
        assert [notes.placement(node) for node in inputs] == [expected] * len(inputs)


def test_frozen_parameters_stay_invariant() -> None:
    model = Attention().requires_grad_(False)
    gm, _ = after(AssignPlacements, model, hidden_states(), context=a_context(grad_sync=False))
    placed = [notes.placement(node) for node in gm.graph.nodes if node.op == "placeholder"]
    assert placed == [R, I, I, I, I, I]  # the input asks for a gradient, the parameters do not


def with_an_unknown_op(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    out = functional.scaled_dot_product_attention(query.sin(), key, value)
    return torch.fft.fft(out.sin(), dim=1).real


def test_an_op_without_a_rule_runs_replicated_and_is_recorded() -> None:
    inputs = [heads() for _ in range(3)]
    _, context = after(AssignPlacements, with_an_unknown_op, *inputs)
    fallback, *readers = context.result.fallbacks
    assert all(reader.gathered_bytes == 0 for reader in readers)
    assert fallback.op == "aten.fft_fft.default"
    assert fallback.gathered_bytes == inputs[0].numel() * 8
    assert "torch.fft.fft(out.sin(), dim=1)" in (fallback.source or "")
    reference, ranks, _ = on_ranks(with_an_unknown_op, *inputs, num_ranks=2)
    assert_ranks_equal_one_device(reference, ranks)


def error_of(model: Any, *args: Any, **options: Any) -> BaseException:
    """What the pass raised; Dynamo puts nothing around it."""
    with pytest.raises(SPTransformError) as caught:
        on_ranks(model, *args, num_ranks=2, **options)
    return caught.value


def test_strict_refuses_an_op_without_a_rule(golden: Golden) -> None:
    error = error_of(with_an_unknown_op, *(heads() for _ in range(3)), strict=True)
    assert isinstance(error, UnsupportedOpError)
    golden.check("errors_strict", message=str(error))


def test_strict_allows_what_needs_no_gathering() -> None:
    def model(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        table = torch.fft.fft(torch.ones(2)).real
        return functional.scaled_dot_product_attention(query, key, value) * table

    reference, ranks, _ = on_ranks(model, *(heads() for _ in range(3)), num_ranks=2, strict=True)
    assert_ranks_equal_one_device(reference, ranks)


def test_no_attention_asks_for_a_hint(golden: Golden) -> None:
    error = error_of(lambda x: x.sin(), hidden_states())
    assert isinstance(error, UsageError)
    golden.check("errors_no_sequence", message=str(error))


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(query.sin(), key, value).sin().mean()


def test_nothing_to_split(golden: Golden) -> None:
    inputs = [heads()[:1].detach().requires_grad_() for _ in range(3)]
    error = error_of(attend, *inputs, strategy=Ulysses(split="batch"))
    assert isinstance(error, UsageError)
    golden.check("errors_nothing_to_split", message=str(error))


@pytest.mark.parametrize("count", [2, 3])
def test_more_ranks_than_heads(count: int) -> None:
    reference, ranks, _ = on_ranks(attend, *(heads(count=count) for _ in range(3)), num_ranks=4)
    assert_ranks_equal_one_device(reference, ranks)


def test_one_head_is_never_silently_wrong() -> None:
    """A dimension of one entry cannot be cut: right, or refused."""
    try:
        reference, ranks, _ = on_ranks(attend, *(heads(count=1) for _ in range(3)), num_ranks=4)
    except SPTransformError:
        return
    assert_ranks_equal_one_device(reference, ranks)


def test_every_tensor_is_placed() -> None:
    gm, _ = after(AssignPlacements, Attention(), hidden_states())
    for node in gm.graph.nodes:
        if dataflow.is_tensor(node):
            assert notes.placement(node) is not None, node
    (attention,) = nodes_of(gm, torch.ops.sptransform.attention.default)
    assert isinstance(notes.placement(attention), Shard)
    assert notes.placement(attention).dim == 1
