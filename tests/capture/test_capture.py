"""What capture keeps of a model: one node for what the user calls one op, regions, source lines, module paths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from sptransform.capture.capture import capture
from sptransform.diagnostics import provenance
from sptransform.diagnostics.errors import CaptureError
from sptransform.engine.pass_manager import run_passes
from sptransform.graph import dataflow, notes
from sptransform.passes import PIPELINE
from sptransform.testing.lockstep import in_lockstep
from tests.passes.blocks import BATCH, HIDDEN, LENGTH, Attention, heads, hidden_states
from tests.support.graphs import (
    Run,
    a_context,
    assert_ranks_equal_one_device,
    captured,
    compiled_with,
    nodes_of,
    on_ranks,
    run_once,
    while_captured,
)
from tests.support.models import build

aten = torch.ops.aten
VOCAB = 11


def targets(gm: fx.GraphModule) -> list[Any]:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


class Small(nn.Module):
    """One of each op that must stay one node."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.attention = Attention()
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(HIDDEN, VOCAB)
        self.double()

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.attention(self.norm(self.tokens(ids))))
        return functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def token_ids() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randint(VOCAB, (BATCH, LENGTH))


def test_ops_stay_one_node() -> None:
    gm, _ = captured(Small(), token_ids(), token_ids())
    found = targets(gm)
    for target, count in {
        aten.cross_entropy_loss.default: 1,
        aten.dropout.default: 1,
        aten.embedding.default: 1,
        aten.layer_norm.default: 1,
        aten.linear.default: 5,
        aten.scaled_dot_product_attention.default: 1,
    }.items():
        assert found.count(target) == count, target


def test_inputs_carry_the_users_names() -> None:
    gm, _ = captured(Small(), token_ids(), token_ids())
    names = {notes.note(node).input_name for node in gm.graph.nodes if node.op == "placeholder"}
    assert {"ids", "labels", "tokens.weight", "attention.query.weight", "head.bias"} <= names


def test_source_lines_and_module_paths() -> None:
    gm, _ = captured(Small(), token_ids(), token_ids())
    (loss,) = nodes_of(gm, aten.cross_entropy_loss.default)
    assert (provenance.source_line(loss) or "").endswith(
        "return functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())"
    )
    assert provenance.module_path(loss) == ""
    (attention,) = nodes_of(gm, aten.scaled_dot_product_attention.default)
    assert "functional.scaled_dot_product_attention(query, key, value, is_causal=True)" in (
        provenance.source_line(attention) or ""
    )
    assert provenance.module_path(attention) == "attention"
    paths = [provenance.module_path(node) for node in nodes_of(gm, aten.linear.default)]
    assert paths == ["attention.query", "attention.key", "attention.value", "attention.out", "head"]


def test_source_lines_are_the_models_not_torchs() -> None:
    """The innermost frame of a linear is in torch.nn; the line to name is the one that called the layer."""
    gm, _ = captured(Small(), token_ids(), token_ids())
    for node in gm.graph.nodes:
        if node.op == "call_function":
            line = provenance.source_line(node)
            assert line is not None and "/torch/" not in line, (node, line)


def test_source_lines_of_hugging_face_models() -> None:
    model, inputs = build("llama")
    gm, _ = captured(model, **inputs)
    (first, *_) = nodes_of(gm, aten.scaled_dot_product_attention.default)
    line = provenance.source_line(first)
    assert line is not None and "/transformers/" in line and "/torch/" not in line
    assert provenance.module_path(first) == "model.layers.0.self_attn"


# ---- autocast


class Block(nn.Module):
    """Attention between linears, and a loss."""

    def __init__(self, around: Callable[[], Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.attention = Attention()
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.around = around
        self.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.around is None:
            y = self.attention(x)
        else:
            with self.around():
                y = self.attention(x)
        return (self.out(y.float()) + x).pow(2).mean()


def narrow() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def test_an_autocast_region_keeps_its_nodes_inside() -> None:
    gm, _ = captured(Block(narrow), hidden_states().float())
    nodes = list(gm.graph.nodes)
    at = {node: position for position, node in enumerate(nodes)}
    (enter,) = [node for node in nodes if "enter_autocast" in str(node.target)]
    (exit_,) = [node for node in nodes if "exit_autocast" in str(node.target)]
    *inside, outside = nodes_of(gm, aten.linear.default)
    assert len(inside) == 4
    assert all(at[enter] < at[node] < at[exit_] for node in inside)
    assert at[outside] > at[exit_]
    assert all(dataflow.value(node).dtype == torch.bfloat16 for node in inside)
    assert dataflow.value(outside).dtype == torch.float32


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_autocast_inside_the_model(num_ranks: int) -> None:
    x = hidden_states().detach().float().requires_grad_()
    reference, ranks, graphs = on_ranks(Block(narrow), x, num_ranks=num_ranks)
    # bfloat16 rounds sums over the sequence, which ranks take apart
    assert_ranks_equal_one_device(reference, ranks, 2e-2)
    exact, _, _ = on_ranks(Block(), x, num_ranks=num_ranks)
    assert not torch.equal(exact.outputs[0], reference.outputs[0])
    moved = nodes_of(graphs[0], torch.ops.sptransform.all_to_all.default)
    assert {value.dtype for node in moved for value in dataflow.values(node)} == {torch.bfloat16}


def test_autocast_around_the_call() -> None:
    x = hidden_states().detach().float().requires_grad_()
    with narrow():
        reference, ranks, graphs = on_ranks(Block(), x, num_ranks=2)
    assert_ranks_equal_one_device(reference, ranks, 2e-2)
    moved = nodes_of(graphs[0], torch.ops.sptransform.all_to_all.default)
    assert {value.dtype for node in moved for value in dataflow.values(node)} == {torch.bfloat16}


def test_a_region_without_autocast_in_one_with_it() -> None:
    """As rotary embeddings are computed: in float32 whatever surrounds them."""

    def model(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            table = (torch.arange(8.0)[:, None] @ torch.ones(1, 2)).sin()
        y = functional.linear(x, weight) + table
        return functional.scaled_dot_product_attention(y, y, y).float().mean()

    x, weight = heads().detach().float().requires_grad_(), torch.eye(2, requires_grad=True)
    with narrow():
        gm, _ = captured(model, x, weight)
        reference, ranks, _ = on_ranks(model, x, weight, num_ranks=2)
    assert dataflow.value(nodes_of(gm, aten.matmul.default)[0]).dtype == torch.float32
    assert dataflow.value(nodes_of(gm, aten.linear.default)[0]).dtype == torch.bfloat16
    assert_ranks_equal_one_device(reference, ranks, 2e-2)


def test_autocast_ends_with_a_failed_capture() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        with narrow():
            return torch.zeros_like(x).normal_()

    with pytest.raises(CaptureError):
        captured(model, torch.zeros(2))
    assert not torch.is_autocast_enabled("cpu")


# ---- regions without gradient


def test_no_gradient_passes_a_no_grad_region() -> None:
    def model(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        query = functional.linear(x, weight)
        with torch.no_grad():
            scale = functional.linear(query, weight).sin()
        return (functional.scaled_dot_product_attention(query, query, query) * scale).mean()

    weight = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    gm, _ = captured(model, heads(), weight)
    (sin,) = nodes_of(gm, aten.sin.default)
    assert not notes.note(sin).differentiable
    for num_ranks in (2, 4):
        reference, ranks, _ = on_ranks(model, heads(), weight, num_ranks=num_ranks)
        assert_ranks_equal_one_device(reference, ranks)


@pytest.mark.covering(ways=1)
@pytest.mark.parametrize("inside_first", [True, False])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_one_sharded_tensor_used_inside_and_outside_of_no_grad(inside_first: bool, num_ranks: int) -> None:
    """Both uses ask for the same move; the one outside must keep its gradient."""

    def attend(x: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(x, x, x)

    def attend_apart(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return attend(x)

    def model(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = functional.linear(x, weight)
        first, second = (attend_apart, attend) if inside_first else (attend, attend_apart)
        return (first(x) * 0.5 + second(x) * x).sin().mean()

    weight = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    reference, ranks, _ = on_ranks(model, heads(), weight, num_ranks=num_ranks)
    assert reference.grads[1] is not None and reference.grads[1].abs().max() > 1e-6
    assert_ranks_equal_one_device(reference, ranks)


def test_a_parameter_first_read_inside_of_no_grad() -> None:
    def model(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            noise = functional.linear(x, weight)
        query = functional.linear(x, weight) + noise
        return functional.scaled_dot_product_attention(query, query, query).sin().mean()

    weight = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    reference, ranks, _ = on_ranks(model, heads(), weight, num_ranks=2)
    assert_ranks_equal_one_device(reference, ranks)


@pytest.mark.parametrize("outputs", ["full", "local"])
def test_gradients_of_a_region_inside_of_the_callers_no_grad(outputs: str) -> None:
    """No node of the graph says that the caller has gradients off: the region has to move its own inputs."""

    def model(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def attend(x: torch.Tensor) -> torch.Tensor:
            x = functional.linear(x, weight)
            return functional.scaled_dot_product_attention(x, x, x) + x

        outside = attend(x)
        with torch.enable_grad():
            inside = attend(x)
        return inside, outside

    weight = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        reference, ranks, graphs = on_ranks(model, heads().requires_grad_(), weight, num_ranks=2, outputs=outputs)
    assert all(grad is not None for grad in reference.grads)
    if outputs == "full":
        assert_ranks_equal_one_device(reference, ranks)
    else:  # each rank has its part of the outputs
        grads = [Run([], rank.grads) for rank in ranks]
        assert_ranks_equal_one_device(Run([], reference.grads), grads)
    assert not notes.region_around(graphs[0].graph).grad_enabled


# ---- activation checkpointing


class Checkpointed(nn.Module):
    """Two blocks, each recomputed in the backward if asked."""

    def __init__(self, is_on: bool = True) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.blocks = nn.ModuleList([Attention(), Attention()])
        self.is_on = is_on

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.is_on else block(x)
        return x.pow(2).mean()


def test_each_region_has_its_tags() -> None:
    gm, _ = captured(Checkpointed(), hidden_states())
    linears = nodes_of(gm, aten.linear.default)
    assert [node.meta["recompute"] for node in linears] == [CheckpointPolicy.PREFER_RECOMPUTE] * 8
    regions = [node.meta["ac_graph_id"] for node in linears]
    assert len(set(regions[:4])) == len(set(regions[4:])) == 1
    assert regions[0] != regions[4]
    assert "recompute" not in nodes_of(gm, aten.mean.default)[0].meta


def collectives_of_a_step(model: nn.Module, num_ranks: int = 2) -> tuple[list[str], list[str]]:
    """Names of the collectives in the forward and the backward graph that AOTAutograd derives."""
    from torch._dynamo.backends.common import aot_autograd

    from sptransform.ops.groups import pretend
    from sptransform.sharding.mesh import PRETENDED_GROUP

    graphs: dict[str, fx.GraphModule] = {}

    def keep(which: str) -> Callable[[fx.GraphModule, list[Any]], fx.GraphModule]:
        return lambda gm, inputs: graphs.setdefault(which, gm)

    def use(gm: fx.GraphModule, inputs: list[Any]) -> None:
        rewritten = run_passes(capture(gm, inputs), PIPELINE, a_context(num_ranks))
        with pretend(PRETENDED_GROUP, 0):
            compiled = aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))(rewritten, inputs)
            in_lockstep(num_ranks, lambda rank: run_once(compiled, inputs))

    while_captured(model, use, hidden_states())

    def names(gm: fx.GraphModule) -> list[str]:
        found = [str(node.target) for node in gm.graph.nodes if "_c10d_functional" in str(node.target)]
        return [name.split(".")[1] for name in found if "wait" not in name]

    return names(graphs["forward"]), names(graphs["backward"])


def test_recomputing_communicates_no_more() -> None:
    plain, recomputed = collectives_of_a_step(Checkpointed(False)), collectives_of_a_step(Checkpointed(True))
    assert plain[0].count("all_to_all_single") == plain[1].count("all_to_all_single") == 4
    assert [sorted(names) for names in recomputed] == [sorted(names) for names in plain]


@pytest.mark.covering(ways=1)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_checkpointing_means_the_same(num_ranks: int, backend: str) -> None:
    reference, ranks, _ = on_ranks(Checkpointed(), hidden_states(), num_ranks=num_ranks, backend=backend)
    assert_ranks_equal_one_device(reference, ranks)
    plain, _, _ = on_ranks(Checkpointed(False), hidden_states(), num_ranks=num_ranks)
    assert_ranks_equal_one_device(plain, ranks)


# ---- dropout


def dropped_of(model: Callable[..., Any], *args: torch.Tensor, num_ranks: int = 2) -> list[list[torch.Tensor]]:
    """Each rank's outputs and its gradient of the first input, outputs left as they are."""
    _, ranks, _ = on_ranks(model, *args, num_ranks=num_ranks, outputs="local")
    return [[*(x for x in run.outputs if x is not None), run.grads[0]] for run in ranks]


def test_dropout_draws_a_mask_for_each_rank_where_sharded() -> None:
    def model(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = functional.linear(x, weight)
        return functional.dropout(torch.ones_like(y), 0.25) + 0 * functional.scaled_dot_product_attention(y, y, y)

    x, weight = torch.randn(4, 4, 256, 2, dtype=torch.float64, requires_grad=True), torch.eye(2, dtype=torch.float64)
    first, second = (outputs[0] for outputs in dropped_of(model, x, weight))
    assert first.shape == second.shape == (4, 4, 128, 2)
    for part in (first, second):
        assert set(part.unique().tolist()) == {0.0, 1 / 0.75}
        assert abs(float(part.mean()) - 1.0) < 0.05
    agreement = float(((first == 0) == (second == 0)).double().mean())
    assert abs(agreement - (0.75**2 + 0.25**2)) < 0.05  # of independent masks


def test_dropout_draws_one_mask_where_replicated() -> None:
    def model(x: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept = functional.dropout(table, 0.5)
        return functional.scaled_dot_product_attention(x, x, x).mean() + kept.sum() * 0, kept

    x = heads()
    table = torch.ones(64, dtype=torch.float64)
    masks = [outputs[1] for outputs in dropped_of(model, x, table)]
    assert torch.equal(*masks)
    assert set(masks[0].unique().tolist()) == {0.0, 2.0}


def test_generators_stay_in_step_behind_a_sharded_dropout() -> None:
    """A replicated draw after a sharded one is the same on all ranks."""

    def model(x: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = functional.dropout(functional.linear(x, x.new_ones(2, 2)), 0.5)
        loss = functional.scaled_dot_product_attention(y, y, y).mean()
        kept = functional.dropout(table, 0.5)
        return loss + kept.sum() * 0, kept

    masks = [outputs[1] for outputs in dropped_of(model, heads(), torch.ones(64, dtype=torch.float64))]
    assert torch.equal(*masks)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_backward_of_dropout_uses_the_same_mask(backend: str) -> None:
    def model(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = functional.scaled_dot_product_attention(x, x, x).detach() * 0 + x
        y = functional.dropout(y, 0.5)
        return y.sum(), y

    x = torch.ones(BATCH, 4, LENGTH, 2, dtype=torch.float64, requires_grad=True)
    _, ranks, _ = on_ranks(model, x, num_ranks=2, backend=backend)
    for run in ranks:
        # y = x * mask / (1 - p) with x = 1, so the gradient of its sum is y itself
        assert torch.equal(run.outputs[1], run.grads[0])
        assert set(run.outputs[1].unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dropout_in_evaluation_is_nothing(p: float) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.dropout = Attention(), nn.Dropout(p)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.dropout(self.attention(x)).sin().mean()

    reference, ranks, _ = on_ranks(Model().eval(), hidden_states(), num_ranks=2)
    assert_ranks_equal_one_device(reference, ranks)


def test_dropping_everything() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        y = functional.scaled_dot_product_attention(x, x, x)
        return functional.dropout(y, 1.0).sum() + x.sum()

    reference, ranks, _ = on_ranks(model, heads(), num_ranks=2)
    assert_ranks_equal_one_device(reference, ranks)


@pytest.mark.parametrize("is_causal", [False, True])
def test_dropout_of_attention(is_causal: bool) -> None:
    def model(x: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = functional.scaled_dot_product_attention(x, x, value, dropout_p=0.3, is_causal=is_causal)
        return out.sum(), out

    x = torch.randn(2, 4, 64, 2, dtype=torch.float64, requires_grad=True)
    value = torch.ones(2, 4, 64, 2, dtype=torch.float64)
    _, ranks, _ = on_ranks(model, x, value, num_ranks=2)
    first, second = (run.outputs[1] for run in ranks)
    assert torch.equal(first, second)  # gathered: the same whole on both
    assert bool(first.isfinite().all())
    halves = first[:, :2], first[:, 2:]
    assert not torch.equal(*halves)  # the ranks' heads, whose masks differ
    for half in halves:
        assert abs(float(half[:, :, 16:].mean()) - 1.0) < 0.1  # probabilities that are kept sum to 1 on average


def test_dropout_of_attention_with_a_seed_of_its_own_on_every_rank_head() -> None:
    """Query heads all alike: without masks of their own both ranks would return the same."""

    def model(x: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5)

    x = torch.ones(1, 2, 16, 2, dtype=torch.float64)
    _, ranks, _ = on_ranks(model, x, num_ranks=2)
    assert not torch.equal(ranks[0].outputs[0][:, 0], ranks[0].outputs[0][:, 1])


# ---- sizes


def test_constants_of_the_graph_have_values() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return x * torch.tensor([1.0, 2.0, 3.0])

    x = torch.randn(2, 3)
    gm, inputs = captured(model, x)
    assert torch.equal(gm(*inputs)[0], model(x))
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            assert dataflow.is_tensor(node)


def test_an_input_that_nothing_reads_stays_an_input() -> None:
    assert compiled_with(lambda x, y: x.sin(), capture, torch.zeros(2), torch.zeros(3)).shape == (2,)
