"""`explain`: what it counts is what runs, on every shape; what it shows is stable, and plain data."""

import functools
import io
import json
from collections.abc import Callable

import pytest
import rich.console
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import sptransform
from sptransform import USP, AllGatherKV, Explanation, Ring, Strategy, explanation_of
from sptransform.compiler.compile_log import summary
from sptransform.diagnostics.errors import UnsupportedOpError
from sptransform.inspection.pages import Section, plain
from tests.passes.blocks import hidden_states
from tests.support.collective_counts import CountCollectives, by_message
from tests.support.gloo_pool import get_pool
from tests.support.golden import Golden
from tests.support.heads import WithLoss, some_labels
from tests.support.models import Inputs
from tests.support.shapes import build_shape

pytestmark = pytest.mark.timeout(240)

Sent = list[tuple[str, str, int]]


def sent_by_tails(rank: int, num_ranks: int, tails: list[str]) -> list[tuple[Sent, Sent, torch.Tensor]]:
    """What a worker does: `sent` for each of the models called `Tail`."""
    return [sent(rank, num_ranks, Tail(tail), "ulysses", {"x": torch.rand(2, 12, 8)}) for tail in tails]


def sent(
    rank: int,
    num_ranks: int,
    model: nn.Module,
    strategy: str | Strategy,
    inputs: Inputs,
    backend: str = "aot_eager",
) -> tuple[Sent, Sent, torch.Tensor]:
    """(kind, direction, bytes) of each collective of a training step: by `explain`, and those that ran; its loss."""
    torch._dynamo.reset()
    explanation = sptransform.explain(model, strategy, inputs, world_size=num_ranks, rank=rank, outputs="full")
    sptransform.parallelize(model, strategy, backend=backend, outputs="full")
    with CountCollectives() as forward:
        loss = model(**inputs).sum()
    with CountCollectives() as backward:
        loss.backward()
    ran = [
        (kind, direction, sent_bytes)
        for direction, counted in (("forward", forward), ("backward", backward))
        for kind, _, sent_bytes in by_message(counted.collectives)
    ]
    return [(c.kind, c.direction, c.bytes_sent) for c in explanation.collectives], ran, loss.detach()


def sent_by_checkpointed(rank: int, num_ranks: int) -> tuple[Sent, Sent, torch.Tensor]:
    """What a worker does: `sent` for a model that recomputes its layer in the backward."""
    model, inputs = build_shape(8, 2, 1, 64, False, num_layers=1)
    model.blocks[0] = Checkpointed(model.blocks[0])
    return sent(rank, num_ranks, model, "ulysses", inputs)


class Checkpointed(nn.Module):
    """A module whose activations are recomputed."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def test_checkpointed_layers_send_nothing_twice() -> None:
    for explained, ran, _ in get_pool(2).run(sent_by_checkpointed, timeout=100):
        assert explained == ran
        assert sum(kind == "all_to_all" for kind, _, _ in ran) == 4


# ---------------------------------------------------------------------------------------------------------------
# What is counted, where no shape decides.


class Tail(nn.Module):
    """Attention, and something after it that shards in another way, or not at all, or has no gradient."""

    def __init__(self, tail: str) -> None:
        super().__init__()
        self.tail = tail
        self.project = nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.project(x).view(2, 12, 4, 2).transpose(1, 2)
        y = functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
        return TAILS[self.tail](y)


def counted(y: torch.Tensor) -> torch.Tensor:
    return y.sum() + (y.detach() > 0).sum()


def detached(y: torch.Tensor) -> torch.Tensor:
    return y.sum() + y.detach().sort(1).values.sum()


def inverted(y: torch.Tensor) -> torch.Tensor:
    return torch.linalg.inv(y[:, :8] + torch.eye(8)).sum()


def without_grad(y: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        noise = y.sort(1).values
    return y.sum() + noise.sum()


TAILS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "count": counted,
    "detached": detached,
    "inverse": inverted,
    "no_grad": without_grad,
    "sort": lambda y: y.sort(1).values,
}


def explained(tail: str, num_ranks: int = 3, **options: object) -> Explanation:
    x = torch.ones(2, 12, 8)
    return sptransform.explain(Tail(tail), "ulysses", (x,), world_size=num_ranks, outputs="full", **options)


def test_gathers_and_what_has_no_gradient_run_as_explained() -> None:
    tails = [
        tail for tail in TAILS if tail != "inverse"
    ]  # its check of errors cannot run where collectives are counted
    for found in get_pool(3).run(sent_by_tails, tails, timeout=100):
        for tail, (explained, ran, _) in zip(tails, found, strict=True):
            assert explained == ran, tail


@pytest.mark.parametrize("tail", ["detached", "no_grad"])
def test_without_a_gradient_there_is_no_backward(tail: str) -> None:
    (gather,) = [r for r in explained(tail).redistributions if r.change in ("S(1) -> I", "S(1) -> R")]
    assert gather.forward is not None
    assert gather.backward is None


def test_frozen_parameters_are_not_reduced() -> None:
    model = Tail("count")
    model.project.weight.requires_grad_(False)
    explanation = sptransform.explain(model, "ulysses", (torch.ones(2, 12, 8),), world_size=2)
    assert not explanation.parameter_gradients
    assert explanation.bytes_sent("backward") == 0


def test_grad_sync_off_reduces_nothing() -> None:
    explanation = explained("count", grad_sync=False)
    assert not explanation.parameter_gradients
    assert "grad_sync=False" in str(explanation)


def test_a_bucket_is_divided_once() -> None:
    """2 (N-1)/N of the whole message, not the rounded sum over its tensors."""
    model, inputs = build_shape(5, 5, 1, 7, False)
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    (bucket,) = sptransform.explain(model, "ulysses", inputs, world_size=3).parameter_gradients
    assert bucket.backward is not None
    assert bucket.backward.bytes_sent == 2 * num_bytes * 2 // 3
    assert sorted(bucket.parameters) == sorted(name for name, _ in model.named_parameters())


def test_gathers_for_ops_that_need_a_whole_axis_are_listed() -> None:
    explanation = explained("sort")
    assert not explanation.fallbacks
    (gathered,) = explanation.gathered
    assert gathered.op.startswith("aten.sort")
    assert gathered.gathered_bytes == 2 * 12 * 8 * 4
    assert gathered.source_line is not None and "y.sort(1)" in gathered.source_line
    assert "y.sort(1)" in str(explanation)


def test_gathers_of_outputs_are_not_listed_as_gathered() -> None:
    model, inputs = build_shape(4, 4, 1, 8, False)
    assert not sptransform.explain(model, "ulysses", inputs, world_size=2, outputs="full").gathered


def test_fallbacks_are_listed() -> None:
    explanation = explained("inverse")
    (fallback,) = explanation.fallbacks
    assert "inv" in fallback.op
    assert fallback.gathered_bytes > 0
    assert "linalg.inv" in str(explanation)
    assert fallback.node not in {gathered.node for gathered in explanation.gathered}


# ---------------------------------------------------------------------------------------------------------------
# What is shown.


def one_layer(num_ranks: int) -> Explanation:
    model, inputs = build_shape(4, 2, 2, 16, True, num_layers=1)
    return sptransform.explain(model, "ulysses", inputs, world_size=num_ranks)


def test_text(golden: Golden) -> None:
    golden.check("explain", text=str(one_layer(2)), one_rank=str(one_layer(1)))


def test_text_is_as_wide_as_its_longest_line() -> None:
    name, sentence = "layers.0 [" + "m" * 999 + "]", "a  b " * 999
    page = [Section("title", ("module", "count"), [(name, "12"), ("n", "3")], [sentence])]
    rows = [f"  {x.ljust(len(name))}  {y}" for x, y in (("module", "count"), (name, "   12"), ("n", "    3"))]
    assert plain(page).splitlines() == ["title", *rows, f"  {sentence}".rstrip()]


def test_graph_by_layer(golden: Golden) -> None:
    explanation = one_layer(2)
    assert explanation.layers == ("", "tokens", "positions", "blocks.0", *explanation.layers[4:])
    golden.check("explain_graph", **{"blocks.0": explanation.graph("blocks.0")})
    assert explanation.graph().count("\n") > explanation.graph("blocks.0").count("\n")


def test_dict_is_plain_data() -> None:
    explanation = one_layer(2)
    data = explanation.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["totals"] == [
        {"direction": t.direction, "kind": t.kind, "count": t.count, "bytes_sent": t.bytes_sent}
        for t in explanation.totals
    ]
    assert sum(map(len, data["graph"].values())) == explanation.graph().count("\n") + 1
    lines = [r["source_line"] for r in data["redistributions"] if r["forward"] and r["forward"]["kind"] == "all_to_all"]
    assert len(lines) == 2
    assert "shapes.py" in lines[0] and "scaled_dot_product_attention" in lines[0]


@pytest.mark.slow
def test_losses_in_chunks() -> None:
    """Of 16 tokens and 7 of 13 classes; what ranks send is in float32, as the logits that they sum."""

    def loss(head: nn.Linear, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(head(x).float().flatten(0, 1), labels.flatten())

    inputs = hidden_states(), some_labels()
    explanation = sptransform.explain(WithLoss(loss), "megatron", inputs, world_size=2, loss_chunk=4)
    (found,) = explanation.losses
    assert (found.tokens, found.classes, found.chunk, found.chunk_bytes) == ("16", "7", 4, 4 * 7 * 4)
    sent = [c for c in explanation.collectives if c.node == found.node]
    assert [(c.kind, c.direction, c.count, c.bytes_sent) for c in sent] == [("all_reduce", "forward", 2, 4 * 16 * 4)]
    assert "for a chunk of tokens" in str(explanation) and explanation.to_dict()["losses"][0]["chunk"] == 4


def test_rich_shows_what_the_text_says() -> None:
    explanation = one_layer(2)
    console = rich.console.Console(width=200, record=True, file=io.StringIO())
    console.print(explanation)
    shown = console.export_text()
    for line in str(explanation).splitlines():
        assert all(word in shown for word in line.split())


@functools.cache
def of_strategy(strategy: str | Strategy, num_ranks: int, rank: int = 0, seq_len: int = 16) -> Explanation:
    """Two layers of four query heads and two key heads, which the model repeats as Llama does."""
    model, inputs = build_shape(4, 2, 2, seq_len, True)
    return sptransform.explain(model, strategy, inputs, world_size=num_ranks, rank=rank)


def test_pages_of_strategies(golden: Golden) -> None:
    golden.check(
        "explain_strategies",
        ring=str(of_strategy(Ring(), 4)),
        allgather=str(of_strategy(AllGatherKV(), 2)),
        allgather_again=str(of_strategy(AllGatherKV(regather=True), 2)),
        usp=str(of_strategy(USP(), 4)),
    )


@pytest.mark.parametrize("strategy", [AllGatherKV(), AllGatherKV(regather=True), Ring(kv="allgather")], ids=str)
def test_what_the_strategy_gathers_is_no_surprise(strategy: Strategy) -> None:
    explanation = of_strategy(strategy, 2)
    assert [r.forward.kind for r in explanation.redistributions if r.change == "S(2) -> R"] == ["all_gather"] * 2
    assert not explanation.gathered


def test_rings_are_plain_data() -> None:
    explanation = of_strategy(Ring(), 4)
    data = explanation.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert [ring["layer"] for ring in data["rings"]] == ["blocks.0", "blocks.1"]
    for ring in data["rings"]:
        assert ring["kernel"] == "CPU flash"
        assert "scaled_dot_product_attention" in ring["source_line"]
        # K, V of two heads of four float64, for four tokens in two rows: to and from a neighbour
        block = 2 * 2 * 4 * 8 * 4 * 2
        assert (ring["forward"]["count"], ring["forward"]["bytes_sent"]) == (3, 3 * block)
        assert (ring["backward"]["count"], ring["backward"]["bytes_sent"]) == (6, 6 * block)
    assert {"direction": "forward", "kind": "send_recv", "count": 6, "bytes_sent": 6 * block} in data["totals"]


def test_the_kernel_that_is_named_is_the_one_for_the_mask() -> None:
    """Masked blocks may need another; on a CPU it is dropout that does."""
    names = {}
    for dropout_p in (0.0, 0.5):

        class Dropped(nn.Module):
            def forward(self, x: torch.Tensor, dropout_p: float = dropout_p) -> torch.Tensor:
                return functional.scaled_dot_product_attention(x, x, x, dropout_p=dropout_p).sum()

        (ring,) = sptransform.explain(Dropped(), "ring", (torch.ones(1, 2, 8, 4),), world_size=2).rings
        names[dropout_p] = ring.kernel
    assert names == {0.0: "CPU flash", 0.5: "PyTorch reference"}


def test_bytes_are_those_of_the_rank() -> None:
    """Of 9 tokens on 4 ranks the first has 3; each passes on all but what its successor had at first."""
    entry = 2 * 2 * 4 * 8 * 2  # K and V: heads, size, bytes, batch
    sizes = [3, 2, 2, 2]
    for rank in (0, 3):
        for ring in of_strategy(Ring(), 4, rank, 9).rings:
            assert ring.forward is not None and ring.backward is not None
            ahead = sum(sizes) - sizes[(rank + 1) % 4]
            home = sum(sizes) - sizes[rank]
            assert ring.forward.bytes_sent == ahead * entry
            assert ring.backward.bytes_sent == (ahead + home) * entry


@pytest.mark.parametrize("strategy", ["allgather", "ring", "usp"])
def test_one_rank_has_no_rings(strategy: str) -> None:
    explanation = of_strategy(strategy, 1)
    assert not explanation.rings and not explanation.collectives
    assert str(explanation).endswith("Nothing is inserted: the model runs as it is.")


def test_without_a_gradient_a_ring_has_no_way_back() -> None:
    model, inputs = build_shape(4, 2, 2, 16, True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    explanation = sptransform.explain(model, "ring", inputs, world_size=2)
    assert [ring.backward for ring in explanation.rings] == [None, None]
    assert explanation.bytes_sent("backward") == 0
    (line,) = [line.split() for line in str(explanation).splitlines() if "blocks.0..1" in line]
    assert line[:5] == ["blocks.0..1", "2", "1", "2,048", "-"]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (Ring(), "7 collectives forward, 13 backward"),  # 3 hops and 6 a layer; the loss, and the gradients
        (AllGatherKV(regather=True), "3 collectives forward, 5 backward"),
        (USP(2, 2), "8 collectives forward, 9 backward"),  # 2 exchanges and a hop a layer; the loss twice
    ],
    ids=str,
)
def test_the_line_in_the_log_counts_hops(strategy: Strategy, expected: str) -> None:
    explanation = of_strategy(strategy, 4)
    rewritten = explanation.rewritten
    line = summary(rewritten.graph_module.graph, rewritten.context)
    assert line == f"{strategy} on 4 ranks: {expected}, 0 fallbacks"
    counts = [sum(c.count for c in explanation.collectives if c.direction == d) for d in ("forward", "backward")]
    assert expected == f"{counts[0]} collectives forward, {counts[1]} backward"


class WithoutHeads(nn.Module):
    """Attention over [batch, tokens, size]: no rule says how it is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.project(x)
        return functional.scaled_dot_product_attention(x, x, x, is_causal=True).sum()


@pytest.mark.parametrize("strategy", ["allgather", "ring", "usp"])
def test_attention_without_a_rule_runs_whole_and_is_reported(strategy: str) -> None:
    arguments = ((torch.ones(2, 12, 8),),)
    options = {"world_size": 4, "sequence_dims": {"x": 1}}
    explanation = sptransform.explain(WithoutHeads(), strategy, *arguments, **options)
    assert {fallback.op for fallback in explanation.fallbacks} == {"aten.scaled_dot_product_attention.default"}
    assert not explanation.rings
    assert "Fallbacks" in str(explanation)
    with pytest.raises(UnsupportedOpError, match="scaled_dot_product_attention"):
        sptransform.explain(WithoutHeads(), strategy, *arguments, strict=True, **options)


def test_equal_layers_share_a_line() -> None:
    model, inputs = build_shape(4, 4, 1, 8, False, num_layers=3)
    page = str(sptransform.explain(model, "ulysses", inputs, world_size=2))
    assert page.count("S(2) -> S(1)") == 1
    assert "blocks.0..2" in page


def test_one_rank_says_that_nothing_is_inserted() -> None:
    explanation = one_layer(1)
    assert not explanation.collectives
    assert not explanation.redistributions
    assert "Nothing is inserted" in str(explanation)


def test_a_rewritten_graph_explains_itself() -> None:
    model, inputs = build_shape(4, 2, 2, 16, True, num_layers=1)
    rewritten = sptransform.rewrite(model, "ulysses", inputs, world_size=2)
    assert explanation_of(rewritten) == one_layer(2)


def test_outputs_say_where_they_end() -> None:
    (output,) = one_layer(2).outputs
    assert (output.placement, output.type) == ("I", "f64[] I")


def test_a_large_model_on_meta_takes_no_memory() -> None:
    """Two layers of Llama 3 8B at 131,072 tokens on 64 ranks: the closed forms, and the model left as it was."""
    heads, key_heads, head_dim, seq_len, num_ranks = 32, 8, 128, 131_072, 64
    config = LlamaConfig(
        hidden_size=heads * head_dim,
        intermediate_size=14_336,
        num_attention_heads=heads,
        num_hidden_layers=2,
        num_key_value_heads=key_heads,
        vocab_size=128_256,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        ids = torch.zeros(1, seq_len, dtype=torch.long)
    explanation = sptransform.explain(model, "ulysses", {"input_ids": ids, "labels": ids}, world_size=num_ranks, rank=1)
    exchanges = [c for c in explanation.collectives if c.kind == "all_to_all"]
    # fewer key heads than ranks: whoever has a query head gets its key head; ranks without heads get nothing
    to_others = [heads - 1 + 2 * (heads - 1), 1]  # Q, K, V heads sent to other ranks by rank 1, then its part of O
    part = seq_len // num_ranks * head_dim * 2
    assert [c.bytes_sent for c in exchanges if c.direction == "forward"] == [
        to_others[0] * part,
        (num_ranks - 1) * part,
    ] * 2
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
