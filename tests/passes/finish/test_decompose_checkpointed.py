"""In a selectively checkpointed region ops become what they run, tagged by the region's policy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.nn import functional
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sptransform.graph.printer import text
from sptransform.passes.finish.decompose_checkpointed import DecomposeCheckpointed
from sptransform.passes.finish.restore_output_order import RestoreOutputOrder
from tests.passes.blocks import Attention, hidden_states
from tests.support.graphs import after, assert_ranks_equal_one_device, nodes_of, on_ranks

aten = torch.ops.aten
SAVED = [aten.mm.default, aten.addmm.default, aten._scaled_dot_product_flash_attention_for_cpu.default]
MUST_SAVE, PREFER_RECOMPUTE = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE


def selective(model: Callable[..., Any], saved: list[Any] = SAVED) -> Callable[..., torch.Tensor]:
    contexts = partial(create_selective_checkpoint_contexts, saved)
    return lambda x: checkpoint(model, x, use_reentrant=False, context_fn=contexts)


def tags(gm: fx.GraphModule) -> dict[Any, set[CheckpointPolicy]]:
    found: dict[Any, set[CheckpointPolicy]] = {}
    for node in gm.graph.nodes:
        if "recompute" in node.meta:
            found.setdefault(node.target, set()).add(node.meta["recompute"])
    return found


def test_ops_are_opened_and_tagged_one_by_one() -> None:
    gm, _ = after(DecomposeCheckpointed, selective(Attention()), hidden_states())
    found = tags(gm)
    for target in SAVED:
        assert found[target] == {MUST_SAVE}
    assert found[torch.ops.sptransform.all_to_all.default] == {MUST_SAVE}
    assert found[aten.t.default] == found[aten.view.default] == {PREFER_RECOMPUTE}
    assert aten.linear.default not in found and aten.scaled_dot_product_attention.default not in found


def test_without_a_policy_nothing_is_opened() -> None:
    model = Attention()
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        before, _ = after(RestoreOutputOrder, run, hidden_states())
        gm, _ = after(DecomposeCheckpointed, run, hidden_states())
        assert text(gm.graph.nodes) == text(before.graph.nodes)


def test_only_the_regions_own_ops_are_opened() -> None:
    first, second = Attention(), Attention()
    gm, _ = after(DecomposeCheckpointed, lambda x: second(selective(first)(x)), hidden_states())
    assert len(nodes_of(gm, aten.linear.default)) == 4


def test_an_op_that_opens_into_writes_stays_one() -> None:
    model = Attention()

    def run(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return model(x) + functional.dropout(table, 0.5).sum()

    contexts = partial(create_selective_checkpoint_contexts, SAVED)
    gm, _ = after(
        DecomposeCheckpointed,
        lambda x, table: checkpoint(run, x, table, use_reentrant=False, context_fn=contexts),
        hidden_states(),
        torch.ones(3, dtype=torch.float64),
    )
    assert tags(gm)[aten.dropout.default] == {PREFER_RECOMPUTE}


def test_means_the_same() -> None:
    model = selective(Attention())
    reference, ranks, graphs = on_ranks(lambda x: model(x).pow(2).mean(), hidden_states(), num_ranks=2)
    assert_ranks_equal_one_device(reference, ranks)
    assert nodes_of(graphs[0], aten.mm.default)


def test_in_autocast_ops_open_into_what_autocast_makes_of_them() -> None:
    model = Attention().float()

    def narrow(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    gm, _ = after(DecomposeCheckpointed, selective(narrow), hidden_states().float())
    products = nodes_of(gm, aten.mm.default) + nodes_of(gm, aten.addmm.default)
    assert [node.meta["val"].dtype for node in products] == [torch.bfloat16] * 4


def test_an_op_is_opened_as_its_operands_need_gradients() -> None:
    """Which ops it runs may depend on that, as torch's choice of a kernel does."""
    library = torch.library.Library("sptransform_tests", "FRAGMENT")
    library.define("by_gradient(Tensor x) -> Tensor")
    forms = {True: lambda x: x.sin().cos(), False: lambda x: x.cos().sin()}
    library.impl("by_gradient", lambda x: forms[x.requires_grad](x), "CompositeImplicitAutograd")
    attention = Attention()

    def model(x: torch.Tensor) -> torch.Tensor:
        by_gradient = torch.ops.sptransform_tests.by_gradient
        return attention(x) + by_gradient(x) + by_gradient(x.detach())

    gm, _ = after(DecomposeCheckpointed, selective(model), hidden_states().requires_grad_())
    found = [node.target for node in gm.graph.nodes if node.target in (aten.sin.default, aten.cos.default)]
    assert found == [aten.sin.default, aten.cos.default, aten.cos.default, aten.sin.default]
