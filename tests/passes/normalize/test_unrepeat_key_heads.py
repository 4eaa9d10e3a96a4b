"""Which repetitions of key heads the pass sees, and that it leaves alone what only looks like one."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from sptransform.graph.printer import text
from sptransform.passes.normalize.unrepeat_key_heads import UnrepeatKeyHeads
from tests.passes.blocks import (
    HEADS,
    Attention,
    Repeat,
    by_expand,
    by_expand_in_tiles,
    by_repeat_interleave,
    by_tiling,
    heads,
    hidden_states,
)
from tests.support.golden import Golden
from tests.support.graphs import after, assert_ranks_equal_one_device, captured, nodes_of, on_ranks

PASS = (UnrepeatKeyHeads(),)


def matches(model: torch.nn.Module) -> bool:
    gm, _ = after(PASS, model, hidden_states())
    found = len(nodes_of(gm, torch.ops.sptransform.attention.default))
    assert found + len(nodes_of(gm, torch.ops.aten.scaled_dot_product_attention.default)) == 1
    return found == 1


@pytest.mark.parametrize("repeat", [by_expand, by_repeat_interleave])
def test_golden(golden: Golden, repeat: Repeat) -> None:
    gm, _ = captured(Attention(repeat), hidden_states())
    done, _ = after(PASS, Attention(repeat), hidden_states())
    golden.check(f"unrepeat_key_heads_{repeat.__name__}", before=text(gm.graph.nodes), after=text(done.graph.nodes))


def by_stacking(x: torch.Tensor) -> torch.Tensor:
    """Not by rearranging ops only."""
    return torch.stack([x, x], 2).flatten(1, 2)


def by_scaling(x: torch.Tensor) -> torch.Tensor:
    return by_expand(x) * 2.0


def after_another_layout(x: torch.Tensor) -> torch.Tensor:
    """Repeated before the transpose back and forth: the shape of the chain does not matter."""
    return x.transpose(1, 2).repeat_interleave(2, 2).transpose(1, 2)


def with_unflatten(x: torch.Tensor) -> torch.Tensor:
    return x.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2).contiguous()


@pytest.mark.parametrize("repeat", [by_expand, by_repeat_interleave, after_another_layout, with_unflatten])
def test_keys_repeated_in_a_row_match(repeat: Repeat) -> None:
    assert matches(Attention(repeat))


@pytest.mark.parametrize("repeat", [by_tiling, by_expand_in_tiles, by_stacking, by_scaling])
def test_other_repetitions_do_not_match(repeat: Repeat) -> None:
    assert not matches(Attention(repeat))


def test_keys_repeated_but_values_not() -> None:
    """Values are repeated in another order: both must be repeated alike."""
    assert not matches(Attention(by_expand, by_tiling))


def test_values_that_have_all_heads() -> None:
    def model(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(query, by_expand(key), value)

    gm, _ = after(PASS, model, heads(), heads(count=2), heads())
    assert not nodes_of(gm, torch.ops.sptransform.attention.default)


def test_different_factors_for_keys_and_values() -> None:
    def model(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(query, by_expand(key), by_expand(value))

    gm, _ = after(PASS, model, heads(), heads(count=2), heads(count=1))
    assert not nodes_of(gm, torch.ops.sptransform.attention.default)
    reference, ranks, _ = on_ranks(model, heads(), heads(count=2), heads(count=1), num_ranks=2)
    assert_ranks_equal_one_device(reference, ranks)


def test_one_key_head_for_all() -> None:
    def model(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(query, by_expand(key), by_expand(value))

    gm, _ = after(PASS, model, heads(), heads(count=1), heads(count=1))
    (node,) = nodes_of(gm, torch.ops.sptransform.attention.default)
    assert node.kwargs["key_head_of"] == [0] * HEADS


def test_other_readers_keep_the_repeated_keys() -> None:
    def model(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        repeated = by_expand(key)
        return functional.scaled_dot_product_attention(query, repeated, by_expand(value)), repeated

    gm, _ = after(PASS, model, heads(), heads(count=2), heads(count=2))
    (node,) = nodes_of(gm, torch.ops.sptransform.attention.default)
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    assert node.args[1].op == "placeholder"
    assert output.args[0][1].meta["val"].shape[1] == HEADS


@pytest.mark.parametrize(
    "repeat", [by_expand, by_repeat_interleave, by_tiling, by_expand_in_tiles, after_another_layout, by_stacking]
)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_meaning(repeat: Repeat, num_ranks: int) -> None:
    reference, ranks, _ = on_ranks(Attention(repeat), hidden_states(), num_ranks=num_ranks)
    assert_ranks_equal_one_device(reference, ranks)
