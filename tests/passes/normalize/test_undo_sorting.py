"""Experts on sorted rows: row by row in the rows' own order where that is proved, untouched where it is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.nn import functional

from sptransform.compiler.options import Options
from sptransform.compiler.rewrite import rewrite_graph
from sptransform.graph.printer import text
from sptransform.op_rules.data_order import SORTS
from sptransform.passes.distribute.assign_placements import AssignPlacements
from sptransform.passes.normalize.undo_sorting import UndoSorting
from sptransform.sharding.mesh import Mesh
from sptransform.strategies.ring import Ring
from sptransform.strategies.ulysses import Ulysses
from tests.passes import routed
from tests.passes.routed import ENTER, EXPERTS, LEAVE, Spelling, grouped_mm, operands
from tests.support.golden import Golden
from tests.support.graphs import (
    a_context,
    after,
    assert_ranks_equal_one_device,
    captured,
    nodes_of,
    on_ranks,
    while_captured,
)
from tests.support.tiers import tiered

aten, sp = torch.ops.aten, torch.ops.sptransform
PASS, PRODUCT = (UndoSorting(),), sp.grouped_product.default


def sorts(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.target in SORTS]


def test_golden(golden: Golden) -> None:
    def model(expert: Tensor, x: Tensor, up: Tensor) -> Tensor:
        keys, order = expert.argmax(-1).flatten().sort()
        ends = torch.histc(keys.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order))
        return grouped_mm(x[order // 2], up, ends).sin()[inverse]

    args = torch.randn(4, 2, EXPERTS), torch.randn(4, 3), torch.randn(EXPERTS, 3, 5)
    before, _ = captured(model, *args)
    done, _ = after(PASS, model, *args)
    golden.check("undo_sorting", before=text(before.graph.nodes), after=text(done.graph.nodes))
    torch.testing.assert_close(done(*args)[0], model(*args))


SPELLINGS = [
    Spelling(),
    *(Spelling(enter=enter) for enter in list(ENTER)[1:]),
    *(Spelling(leave=leave) for leave in LEAVE if leave is not routed.inverse_by_write),
    Spelling(sort=routed.sort_by, ends=routed.cumulated_unsorted),
    Spelling(sort=routed.read_argsort, ends=routed.searched),
    Spelling(k=1, leave=routed.added),
    Spelling(k=1, enter="repeated"),
    Spelling(k=3, bias=False),
    Spelling(enter="gathered", leave=routed.added_by_scatter),
]


@pytest.mark.parametrize("spelling", tiered(SPELLINGS, quick=[Spelling()]), ids=str)
def test_ranks_equal_one_device(spelling: Spelling) -> None:
    """Shared unevenly, and nothing gathered but the sums of gradients."""
    options: dict[str, Any] = {"num_ranks": 3, "sequence_dims": {"x": 1}}
    reference, ranks, graphs = on_ranks(spelling.model, *operands(), **options)
    assert_ranks_equal_one_device(reference, ranks)
    for graph in graphs:
        assert not sorts(graph)
        assert not nodes_of(graph, sp.all_gather.default)
        products = nodes_of(graph, PRODUCT)
        assert {node.meta["val"].shape[0] for node in products} <= {2 * n * spelling.k for n in (4, 2)}


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    spelling=st.builds(
        Spelling,
        enter=st.sampled_from(sorted(ENTER)),
        leave=st.sampled_from(LEAVE),
        sort=st.sampled_from([torch.sort, routed.sort_by, routed.read_argsort]),
        ends=st.sampled_from([routed.cumulated, routed.cumulated_unsorted, routed.searched]),
        k=st.integers(1, EXPERTS),
        bias=st.booleans(),
    ),
    length=st.integers(3, 9),
    num_ranks=st.integers(2, 4),
    strategy=st.sampled_from([Ulysses(), Ring(), Ring(layout="contiguous")]),
)
def test_any_spelling_on_any_ranks(spelling: Spelling, length: int, num_ranks: int, strategy: Any) -> None:
    options: dict[str, Any] = {"num_ranks": num_ranks, "sequence_dims": {"x": 1}, "strategy": strategy}
    reference, ranks, graphs = on_ranks(spelling.model, *operands(length), **options)
    assert_ranks_equal_one_device(reference, ranks)
    assert not any(sorts(graph) for graph in graphs)


@pytest.mark.slow
def test_lengths_stay_open() -> None:
    x, *weights = operands(16)
    torch._dynamo.mark_dynamic(x, 1)

    def rewritten(gm: fx.GraphModule, found: list[Any]) -> fx.GraphModule:
        return rewrite_graph(gm, found, Options(sequence_dims={"x": 1}), Mesh.pretended(2))[0]

    spelling = Spelling(enter="gathered", leave=routed.added_by_scatter)
    gm = while_captured(spelling.model, rewritten, x, *weights)
    assert not sorts(gm)
    assert not nodes_of(gm, aten.scatter_add.default)
    assert all(isinstance(node.meta["val"].shape[0], torch.SymInt) for node in nodes_of(gm, PRODUCT))


def capacity(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Each expert takes the first tokens that choose it, and drops the others: who comes first is not row by row."""
    rows = x.flatten(0, 1)
    expert = (rows @ gate).argmax(-1)
    chosen = functional.one_hot(expert, EXPERTS)
    place = (chosen.cumsum(0) * chosen).sum(-1)
    kept = (place <= 3).to(x.dtype)[:, None]
    return (torch.einsum("nk,nkf->nf", rows, up[expert]) * kept).square().sum()


@pytest.mark.slow
def test_tokens_beyond_a_capacity_are_dropped_as_on_one_device() -> None:
    x, gate, up, *_ = operands()
    reference, ranks, _ = on_ranks(capacity, x, gate, up, num_ranks=3, sequence_dims={"x": 1})
    assert_ranks_equal_one_device(reference, ranks)


@pytest.mark.slow
def test_counts_are_sums_over_ranks() -> None:
    """A bias that balances experts by counts of who was chosen: no rank has another's choices."""

    def model(x: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        expert = (x.flatten(0, 1) @ gate).topk(2)[1]
        keys, _ = expert.flatten().sort()
        shares = functional.one_hot(expert, EXPERTS).double().mean((0, 1))
        return x.square().sum(), torch.histc(keys.double(), EXPERTS, 0, EXPERTS - 1), shares

    x, gate, *_ = operands()
    reference, ranks, graphs = on_ranks(model, x, gate.detach(), num_ranks=3, sequence_dims={"x": 1})
    assert_ranks_equal_one_device(reference, ranks)
    assert not any(nodes_of(graph, sp.all_gather.default) for graph in graphs)


def changed(**how: Callable[..., Any]) -> Spelling:
    return replace(Spelling(), **how)


def of_another(expert: Tensor, keys: Tensor) -> Tensor:
    """Where groups of other numbers end."""
    return routed.cumulated(expert, torch.zeros_like(keys))


def descending(expert: Tensor) -> tuple[Tensor, Tensor]:
    return expert.sort(descending=True)


def shifted(expert: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of which nobody knows that they are numbers of groups."""
    return (expert - 1).abs().sort()


def too_few(expert: Tensor, keys: Tensor) -> Tensor:
    """Bins that join two groups."""
    return torch.histc(keys.float(), EXPERTS, 0, 2 * EXPERTS).cumsum(0).int()


def cut_off(expert: Tensor, keys: Tensor) -> Tensor:
    return torch.searchsorted(keys, torch.arange(EXPERTS), right=False)


NOT_PROVED = {
    "counts of other numbers": changed(ends=of_another),
    "descending": changed(sort=descending),
    "numbers that may be any": changed(sort=shifted),
    "other bins": changed(ends=too_few),
    "beginnings": changed(ends=cut_off),
}


@pytest.mark.parametrize("name", tiered(NOT_PROVED, quick=["numbers that may be any"]))
def test_what_is_not_proved_stays_and_is_reported(name: str) -> None:
    context = a_context(3, sequence_dims={"x": 1})
    gm, _ = after(AssignPlacements, NOT_PROVED[name].model, *operands(), context=context)
    assert not nodes_of(gm, PRODUCT)
    assert {fallback.op for fallback in context.result.fallbacks} == {"sptests.grouped_mm_fallback.default"}


@pytest.mark.slow
@pytest.mark.parametrize("name", NOT_PROVED)
def test_what_is_not_proved_is_exact(name: str) -> None:
    options: dict[str, Any] = {"num_ranks": 3, "sequence_dims": {"x": 1}}
    reference, ranks, _ = on_ranks(NOT_PROVED[name].model, *operands(), **options)
    assert_ranks_equal_one_device(reference, ranks)


def positions_of_rows(y: Tensor, keys: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return (y + torch.arange(len(y))[:, None])[inverse]


def running_sum(y: Tensor, keys: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return y.cumsum(0)[inverse]


def of_neighbours(y: Tensor, keys: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return y.unflatten(0, (2, -1)).flip(0).flatten(0, 1)[inverse]


def another_order(y: Tensor, keys: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return y[keys.flip(0).argsort().argsort()]


def looked_up(y: Tensor, keys: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """A table in this order: which of its rows is which matters to who looks one up."""
    return functional.embedding(keys, y)


def half(y: Tensor, keys: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return y[:3][inverse[:3] % 3]


MIXED = (positions_of_rows, running_sum, of_neighbours, another_order, looked_up, half)


@pytest.mark.slow
@pytest.mark.parametrize("mix", MIXED)
def test_what_depends_on_the_order_stays(mix: Callable[..., Tensor]) -> None:
    def model(key: Tensor, x: Tensor) -> Tensor:
        keys, order = key.sort()
        return mix(x[order].sin(), keys, order, order.argsort()).cos()

    key, x = torch.randint(3, (6,)), torch.randn(6, 3, dtype=torch.float64)
    gm, _ = after(PASS, model, key, x)
    assert sorts(gm)
    torch.testing.assert_close(gm(key, x)[0], model(key, x))


@pytest.mark.slow
def test_sums_are_taken_in_any_order_and_equal_rows_have_none() -> None:
    def model(key: Tensor, x: Tensor) -> Tensor:
        rows = x[key.argsort()] + torch.ones(1, 3).expand(len(key), 3).double()
        return torch.mm(rows.t(), rows).sum() + rows.square().mean() + torch.histc(key.sort()[0].double(), 3, 0, 3)[0]

    key, x = torch.randint(3, (6,)), torch.randn(6, 3, dtype=torch.float64)
    gm, _ = after(PASS, model, key, x)
    assert not sorts(gm)
    torch.testing.assert_close(gm(key, x)[0], model(key, x))


@pytest.mark.slow
def test_what_has_no_gradient_gets_none() -> None:
    """The order begins, or ends, where no gradients are recorded."""

    def begins(key: Tensor, x: Tensor) -> Tensor:
        order = key.argsort()
        with torch.no_grad():
            rows = x[order]
        return (rows * x[order])[order.argsort()].sum()

    def ends(key: Tensor, x: Tensor) -> Tensor:
        order = key.argsort()
        rows = x[order].sin()
        with torch.no_grad():
            out = rows[order.argsort()]
        return (out * x).sum()

    key = torch.randint(3, (6,))
    for model in (begins, ends):
        grads = []
        x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
        gm, _ = after(PASS, model, key, x)
        assert not sorts(gm)
        for call in (model, lambda *args, gm=gm: gm(*args)[0]):
            grads.append(torch.autograd.grad(call(key, x), x)[0])
        torch.testing.assert_close(*grads)
