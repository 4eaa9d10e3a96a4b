"""A strategy that splits the sequence, then Megatron TP-SP of each rank's part: as context and tensor parallelism go
together. In lockstep, in one process; real ranks are in `tests/end_to_end/test_composition_gloo.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.nn import functional

from sptransform import AllGatherKV, MegatronSP, Ring, Ulysses, UsageError, explain, explanation_of
from sptransform.compiler.rewrite import rewrite
from sptransform.graph import notes
from sptransform.sharding.mesh import PRETENDED_GROUP
from sptransform.strategies.composed import Composed
from sptransform.strategies.names import strategy_of
from tests.support.equality import assert_equal_to_one_device, one_device, run_one_device
from tests.support.models import FLOAT64, HEADS, HIDDEN, LAYERS, MODELS, build
from tests.support.rewritten import Asked, model_on_pretended_ranks, on_pretended_ranks, rewritten_model
from tests.support.tiers import tiered

SEQUENCE = ("allgather", "ring", "ulysses")
B, S, KEY_HEADS = 2, 64, 4


def check_model(
    name: str, kinds: Sequence[str], shape: tuple[int, int] = (2, 2), length: int = S, layers: int = 1
) -> None:
    asked = [Asked(shape, (kind, "megatron")) for kind in kinds]
    reference = run_one_device(*build(name, seq_len=length, layers=layers))
    for ranks in model_on_pretended_ranks(name, asked, seq_len=length, layers=layers).values():
        for result in ranks.results():
            assert_equal_to_one_device(reference, result, MODELS[name].tolerance)


# what two key heads over two ranks of Ulysses leave is nothing for tensor parallelism
IMPOSSIBLE = ("llama_mha_kv2", "ulysses")


@pytest.mark.parametrize(
    ("name", "kind"),
    tiered(
        [(name, "ring") for name in ("bert", "llama")]
        + [(name, "ulysses") for name in ("gpt2", "torch_encoder")]
        + [("qwen3", "allgather")],
        quick=[("gpt2", "ulysses"), ("qwen3", "allgather")],
    ),
)
def test_models(name: str, kind: str) -> None:
    check_model(name, [kind])


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_models_with_every_strategy(name: str) -> None:
    check_model(name, [kind for kind in SEQUENCE if (name, kind) != IMPOSSIBLE], layers=LAYERS)


@pytest.mark.parametrize(
    ("shape", "length", "kinds"),
    tiered(
        [((2, 2), 23, SEQUENCE), ((2, 3), 22, ("ring",)), ((2, 2), 5, SEQUENCE), ((3, 2), 64, ("allgather", "ring"))],
        quick=[((2, 3), 22, ("ring",))],
    ),
    ids=str,
)
def test_shapes(shape: tuple[int, int], length: int, kinds: Sequence[str]) -> None:
    """Any shape is exact: heads of 8 and 4 over 3 ranks, and lengths nothing divides."""
    check_model("llama_nocache", kinds, shape, length)


@pytest.mark.parametrize("layers", tiered([1, LAYERS], quick=[1]))
def test_batch_split(layers: int) -> None:
    """Ulysses by the batch: heads are tensor parallelism's alone, so two key heads will do."""
    asked = Asked((2, 2), (Ulysses(split="batch"), MegatronSP()))
    (ranks,) = model_on_pretended_ranks("llama_mha_kv2", [asked], layers=layers).values()
    reference = one_device("llama_mha_kv2", layers=layers)
    for result in ranks.results():
        assert_equal_to_one_device(reference, result, MODELS["llama_mha_kv2"].tolerance)


Sent = tuple[int, int]


def sent_in_second_layer(kind: str, shape: tuple[int, int]) -> dict[tuple[str, str], Sent]:
    """(kind, direction) -> number of messages, elements. The first layer would have the embedding's."""
    collectives = explanation_of(rewritten_model("llama_nocache", (kind, "megatron"), shape)).collectives
    found: dict[tuple[str, str], Sent] = {}
    for c in collectives:
        if c.layer.startswith("model.layers.1"):
            messages, elements = found.get((c.kind, c.direction), (0, 0))
            found[c.kind, c.direction] = messages + c.count, elements + c.bytes_sent // 8
    return found


@pytest.mark.parametrize(("kind", "c", "t"), [(kind, 2, 2) for kind in SEQUENCE] + [("ring", 4, 2), ("ring", 2, 4)])
def test_a_layer_sends_what_both_send_of_their_part(kind: str, c: int, t: int) -> None:
    """Tensor parallelism as in numbers.md, of S/c tokens; the other strategy with 1/t of the heads. Nothing else."""
    queries, keys, rows = HEADS // t, KEY_HEADS // t, B * (S // c) * (HIDDEN // HEADS)
    stream = B * (S // c) * HIDDEN * (t - 1) // t
    expected = {
        ("all_gather", "forward"): (2, 2 * stream),
        ("reduce_scatter", "forward"): (2, 2 * stream),
        ("all_gather", "backward"): (4, 4 * stream),
        ("reduce_scatter", "backward"): (2, 2 * stream),
    }
    hops, of_keys = c - 1, 2 * keys * rows * (c - 1)
    if kind == "ring":
        expected |= {("send_recv", "forward"): (hops, of_keys), ("send_recv", "backward"): (2 * hops, 2 * of_keys)}
    elif kind == "allgather":
        expected["all_gather", "forward"] = 3, 2 * stream + of_keys
        expected["reduce_scatter", "backward"] = 3, 2 * stream + of_keys
    else:
        moved = 2, (2 * queries + 2 * keys) * rows * (c - 1) // c
        expected |= {("all_to_all", "forward"): moved, ("all_to_all", "backward"): moved}
    assert sent_in_second_layer(kind, (c, t)) == expected


@pytest.mark.parametrize("kind", SEQUENCE)
def test_gradients_are_summed_where_they_are_pending(kind: str) -> None:
    """Of what tensor parallelism cuts over the first mesh dim, of norms over both at once."""
    graph = rewritten_model("llama_nocache", (kind, "megatron"), (2, 2)).graph_module.graph
    groups: dict[str, set[str]] = {}
    for node in graph.find_nodes(op="call_function", target=torch.ops.sptransform.replicate.default):
        names = (str(notes.note(x).input_name) for x in node.args[0])
        groups.setdefault(node.args[1], set()).update("norm" if "norm" in name else "cut" for name in names)
    assert groups == {PRETENDED_GROUP: {"norm"}, f"{PRETENDED_GROUP}_outer": {"cut"}}


def test_even_shares_give_all_ranks_one_graph() -> None:
    model, inputs = build("gpt2", layers=1)
    rewritten = [rewrite(model, ("ulysses", "megatron"), inputs, world_size=(2, 2), rank=rank) for rank in range(4)]
    assert len({graph.text("transformer.h.0") for graph in rewritten}) == 1  # the vocabulary of 97 is beyond the layers


# --- what does not go together ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "world_size", "found"),
    [
        (("megatron", "ring"), (2, 2), "do not go together"),
        (("ring", "ulysses"), (2, 2), "'usp'"),
        (("usp", "megatron"), (2, 2), "do not go together"),
        (("ring", "ulysses", "megatron"), (2, 2, 2), "do not go together"),
        ((), (2, 2), "do not go together"),
        (("ring", "megatron"), 4, "a mesh has a dim for each strategy"),
        (("ring", "megatron"), (2, 2, 2), "at most 2 mesh dims"),
        (("ulysses", "megatron"), (4, 2), "8 query heads, 4 key heads, 4 x 2 ranks"),
        ("ring", (2, 2), "takes one mesh dim"),
        ("usp", (2, 2, 2), "at most 2 mesh dims"),
    ],
)
def test_refused(strategy: object, world_size: object, found: str) -> None:
    model, inputs = build("llama_nocache")
    with pytest.raises(UsageError, match=found):
        explain(model, strategy, inputs, world_size=world_size)
    if not isinstance(strategy, str) and len(strategy) == 2 and found == "do not go together":
        with pytest.raises(UsageError, match=found):
            Composed(tuple(map(strategy_of, strategy)))


@pytest.mark.parametrize("kind", SEQUENCE)
def test_sequences_too_short_for_two_dims(kind: str) -> None:
    with pytest.raises(UsageError, match="too short to be split over two mesh dims"):
        rewritten_model("llama_nocache", (kind, "megatron"), (2, 2), seq_len=3, layers=1)


class EncoderDecoder(nn.Module):
    """Attention that sees everything, then causal attention: two layouts would each suit one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
        self.decoder = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for attention, is_causal in ((self.encoder, False), (self.decoder, True)):
            query, key, value = functional.linear(x, attention.in_proj_weight).chunk(3, -1)
            heads = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (query, key, value))
            out = functional.scaled_dot_product_attention(*heads, is_causal=is_causal)
            x = x + functional.linear(out.transpose(1, 2).flatten(2), attention.out_proj.weight)
        return x.sin().mean()


@pytest.mark.parametrize("kind", ["allgather", "ring"])
def test_the_layout_of_a_sequence_is_one_for_all_its_attention(kind: str) -> None:
    """Nine tokens are 3, 2, 2, 2 in zigzag; contiguous chunks would leave the last rank none, and be refused."""
    model = EncoderDecoder()
    inputs = {"x": torch.randn(2, 9, 8, dtype=torch.float64)}
    (ranks,) = on_pretended_ranks(model, inputs, [Asked((4, 2), (kind, "megatron"))]).values()
    reference = run_one_device(model, inputs)
    for result in ranks.results():
        assert_equal_to_one_device(reference, result, FLOAT64)


def test_one_of_one_is_that_one() -> None:
    assert strategy_of(["ring"]) == Ring() and strategy_of(("ring", "megatron")) == Composed((Ring(), MegatronSP()))
    assert str(strategy_of(("allgather", "megatron"))) == f"{AllGatherKV()} x {MegatronSP()}"
