"""Tensor parallelism with sequence parallelism, found by placements: equal to one device, and sends what Megatron does.

In lockstep, in one process, with parameters whole on every rank; parameters kept in parts are in
`tests/end_to_end/test_megatron_gloo.py`.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sptransform import MegatronSP, explanation_of
from sptransform.compiler.rewrite import Rewritten, rewrite
from sptransform.graph import dataflow
from tests.support.equality import assert_equal_to_one_device, one_device, run_one_device
from tests.support.models import FLOAT64, HIDDEN, LAYERS, MODELS, VOCAB
from tests.support.rewritten import Asked, model_on_pretended_ranks, on_pretended_ranks, rewritten_model
from tests.support.tiers import tiered

B, S, H, D = 2, 24, 4, 4
WIDTH = H * D
ASKED = [Asked(n, MegatronSP()) for n in (2, 3, 4)]


@pytest.mark.parametrize(
    ("name", "asked"),
    tiered(
        [(name, asked) for name in MODELS for asked in ASKED],
        quick=[("gpt2", ASKED[0]), ("llama_mha_kv2", ASKED[1]), ("torch_encoder", ASKED[1]), ("qwen3", ASKED[0])],
    ),
    ids=str,
)
def test_models(name: str, asked: Asked) -> None:
    (ranks,) = model_on_pretended_ranks(name, [asked]).values()
    for result in ranks.results():
        assert_equal_to_one_device(one_device(name), result, MODELS[name].tolerance)


class Block(nn.Module):
    """Attention and an MLP around a residual stream; `mlp` makes the MLP, `qkv` the queries, keys and values."""

    def __init__(self, qkv: Callable[[], nn.Module], mlp: Callable[[], nn.Module], bias: bool = True) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH, padding_idx=3)
        self.before, self.between, self.after = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.qkv, self.mlp = qkv(), mlp()
        self.out = nn.Linear(self.qkv.num_heads * D, WIDTH, bias=bias)
        self.head = nn.Linear(WIDTH, VOCAB, bias=bias)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.tokens(ids)
        query, key, value = self.qkv(self.before(x))
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        x = x + self.mlp(self.between(x))
        return functional.cross_entropy(self.head(self.after(x)).flatten(0, 1), labels.flatten())


class Projections(nn.Module):
    """Queries, keys and values of three linears."""

    def __init__(self, num_heads: int = H, num_key_heads: int = H, bias: bool = True, norm: bool = False) -> None:
        super().__init__()
        self.num_heads, self.norm = num_heads, norm
        self.query, self.key, self.value = (
            nn.Linear(WIDTH, n * D, bias=bias) for n in (num_heads, num_key_heads, num_key_heads)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        query, key, value = (f(x) for f in (self.query, self.key, self.value))
        if self.norm:  # over all heads, of which some ranks have one together
            key = key * torch.rsqrt(key.square().mean(-1, keepdim=True) + 1e-6)
        return tuple(y.unflatten(-1, (-1, D)).transpose(1, 2) for y in (query, key, value))


class Fused(nn.Module):
    """One linear, cut to queries, keys and values as `how` says."""

    def __init__(self, how: str, num_heads: int = H, num_key_heads: int = H, norm: bool = False) -> None:
        super().__init__()
        self.how, self.num_heads = how, num_heads
        self.norm = nn.LayerNorm(num_key_heads * D) if norm else nn.Identity()
        self.sizes = [n * D for n in (num_heads, num_key_heads, num_key_heads)]
        self.linear = nn.Linear(WIDTH, sum(self.sizes))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        fused = self.linear(x)
        if self.how == "chunk":
            pieces = fused.chunk(3, -1)
        elif self.how == "split":
            query, key, value = fused.split(self.sizes, -1)
            pieces = query, key, self.norm(value)
        elif self.how == "slice":
            first, second = self.sizes[0], self.sizes[0] + self.sizes[1]
            pieces = fused[..., :first], fused[..., first:second], fused[..., second:]
        elif self.how == "heads outside":  # every head has its query, key and value side by side
            query, key, value = fused.unflatten(-1, (self.num_heads, 3 * D)).chunk(3, -1)
            return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        else:
            query, key, value = fused.unflatten(-1, (3, self.num_heads, D)).permute(2, 0, 3, 1, 4)
            return query, key, value
        return tuple(piece.unflatten(-1, (-1, D)).transpose(1, 2) for piece in pieces)


class Gated(nn.Module):
    """A fused gate and up projection, and a width of `inner`."""

    def __init__(self, inner: int, norm: bool = False) -> None:
        super().__init__()
        self.fused, self.down = nn.Linear(WIDTH, 2 * inner), nn.Linear(inner, WIDTH)
        self.norm = nn.LayerNorm(inner) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.fused(x).chunk(2, -1)
        return self.down(self.norm(functional.silu(gate) * up))


class LowRank(nn.Module):
    """Attention whose queries come of few numbers a token, which are normed."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.rest = nn.Linear(WIDTH, 6), nn.Linear(6, WIDTH), Projections()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        low = self.down(x)
        query = self.up(low * torch.rsqrt(low.square().mean(-1, keepdim=True) + 1e-6))
        _, key, value = self.rest(x)
        query = query.unflatten(-1, (-1, D)).transpose(1, 2)
        return self.out(functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def plain(inner: int = 4 * WIDTH) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, inner), nn.GELU(), nn.Linear(inner, WIDTH))


BLOCKS: dict[str, Callable[[], Block]] = {
    "plain": lambda: Block(Projections, plain),
    "without biases": lambda: Block(functools.partial(Projections, bias=False), plain, bias=False),
    "5 query heads, 1 key head": lambda: Block(functools.partial(Projections, 5, 1), plain),
    "6 query heads, 2 key heads": lambda: Block(functools.partial(Projections, 6, 2), plain),
    "keys normed": lambda: Block(functools.partial(Projections, 4, 2, norm=True), plain),
    "3 heads": lambda: Block(functools.partial(Projections, 3, 3), plain),
    "an MLP of 37": lambda: Block(Projections, lambda: plain(37)),
    "an MLP of 3": lambda: Block(Projections, lambda: plain(3)),
    "gated": lambda: Block(Projections, lambda: Gated(24)),
    "gated, 13": lambda: Block(Projections, lambda: Gated(13)),
    "a second attention": lambda: Block(Projections, LowRank),
    "a norm inside": lambda: Block(Projections, lambda: Gated(24, norm=True)),
    **{
        f"fused by {how}": lambda how=how: Block(lambda: Fused(how), plain)
        for how in ("chunk", "split", "slice", "heads outside", "reshape")
    },
    "fused, values normed": lambda: Block(lambda: Fused("split", norm=True), plain),
    "fused, 6 and 2 heads": lambda: Block(lambda: Fused("split", 6, 2), plain),
    "sliced, 6 and 2 heads": lambda: Block(lambda: Fused("slice", 6, 2), plain),
}


def block_of(name: str) -> tuple[Block, dict[str, Tensor]]:
    torch.manual_seed(0)
    block = BLOCKS[name]().double()
    ids, labels = torch.randint(VOCAB, (B, S)), torch.randint(VOCAB, (B, S))
    labels[:, ::5] = -100
    return block, {"ids": ids, "labels": labels}


@pytest.mark.covering(ways=1)
@pytest.mark.parametrize("asked", ASKED, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str, asked: Asked) -> None:
    block, inputs = block_of(name)
    reference = run_one_device(block, inputs)
    (ranks,) = on_pretended_ranks(block, inputs, [asked]).values()
    for result in ranks.results():
        assert_equal_to_one_device(reference, result, FLOAT64)


@pytest.mark.parametrize("length", tiered([23, 5, 3], quick=[5]))
def test_lengths_that_do_not_divide(length: int) -> None:
    block, inputs = block_of("6 query heads, 2 key heads")
    inputs = {key: x[:, :length] for key, x in inputs.items()}
    reference = run_one_device(block, inputs)
    for ranks in on_pretended_ranks(block, inputs, ASKED).values():
        for result in ranks.results():
            assert_equal_to_one_device(reference, result, FLOAT64)


def rewritten(name: str, num_ranks: int) -> Rewritten:
    block, inputs = block_of(name)
    return rewrite(block, MegatronSP(), inputs, world_size=num_ranks)


def parts(graph: Rewritten) -> dict[str, int]:
    """The dimension of each parameter that ranks keep a part of."""
    nodes = graph.graph_module.graph.find_nodes(op="placeholder")
    notes = [node.meta["sptransform"] for node in nodes]
    return {note.input_name: note.stored[0].dim for note in notes if note.stored}


@pytest.mark.parametrize("name", [name for name in BLOCKS if "fused" in name or "sliced" in name])
def test_fused_projections_are_cut(name: str) -> None:
    found = parts(rewritten(name, 2))
    assert found["qkv.linear.weight"] == found["qkv.linear.bias"] == 0
    assert found["out.weight"] == 1
    assert "out.bias" not in found


def test_inner_axes() -> None:
    """Column-parallel, row-parallel, vocabulary; what a norm needs whole is not cut."""
    found = parts(rewritten("plain", 2))
    assert found == {
        "tokens.weight": 0,
        "head.weight": 0,
        "head.bias": 0,
        "out.weight": 1,
        "mlp.0.weight": 0,
        "mlp.0.bias": 0,
        "mlp.2.weight": 1,
        **{f"qkv.{name}.{kind}": 0 for name in ("query", "key", "value") for kind in ("weight", "bias")},
    }
    low = parts(rewritten("a second attention", 2))
    assert low["mlp.up.weight"] == 0 and "mlp.down.weight" not in low, "of two linears to heads, the second is cut"
    normed = parts(rewritten("a norm inside", 2))
    assert not any(name.startswith("mlp") for name in normed)


def sent(graph: Rewritten, layer: str) -> Counter[tuple[str, str]]:
    return Counter((c.direction, c.kind) for c in explanation_of(graph).collectives if c.layer.startswith(layer))


@pytest.mark.parametrize(
    ("name", "num_ranks"),
    tiered(
        [(name, n) for name in ("llama_nocache", "gpt2", "opt") for n in (2, 4)],
        quick=[("llama_nocache", 4), ("gpt2", 2)],
    ),
)
def test_messages_and_bytes_of_a_layer(name: str, num_ranks: int) -> None:
    """numbers.md: 4 BSh(N-1)/N elements forward; backward 6 where the gathered is gathered again, else 4."""
    elements = Fraction(2 * 64 * HIDDEN * (num_ranks - 1), num_ranks)
    for regather, backward in ((True, 6), (False, 4)):
        graph = rewritten_model(name, MegatronSP(regather=regather), num_ranks)
        messages = [c for c in explanation_of(graph).collectives if c.kind in ("all_gather", "reduce_scatter")]
        # what an embedding gives is scattered in front of its first reader, in the first layer
        in_layers = (c for c in messages if any(part.isdigit() for part in c.layer.split(".")))
        inside = [c for c in in_layers if not c.node.startswith("embedding")]
        found = Counter((c.direction, c.kind) for c in inside)
        assert found == {
            ("forward", "all_gather"): 2 * LAYERS,
            ("forward", "reduce_scatter"): 2 * LAYERS,
            ("backward", "all_gather"): (backward - 2) * LAYERS,
            ("backward", "reduce_scatter"): 2 * LAYERS,
        }
        assert {c.bytes_sent for c in inside} == {elements * 8}
        # beyond the layers: the embedding's reduce-scatter, the head's all-gather, and their transposes
        # (a table of positions is scattered apart, where a conversion stands between it and the sum)
        tables = 1 if name == "llama_nocache" else 2
        outside = Counter((c.direction, c.kind) for c in messages if c not in inside)
        assert outside == {
            ("forward", "reduce_scatter"): tables,
            ("forward", "all_gather"): 1,
            ("backward", "reduce_scatter"): 1,
            ("backward", "all_gather"): tables + regather,
        }


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_no_rank_has_all_logits(num_ranks: int) -> None:
    graph = rewritten("plain", num_ranks)
    values = [value for node in graph.graph_module.graph.nodes for value in dataflow.values(node)]
    largest = max(value.shape.numel() for value in values)
    assert largest == B * S * -(-VOCAB // num_ranks)


@pytest.mark.parametrize("name", tiered(["llama_nocache", "opt"], quick=["llama_nocache"]))
def test_what_is_scattered_comes_from_a_linear(name: str) -> None:
    """Between linears everything is sharded on the sequence: no residual addition is of pending sums."""
    graph = rewritten_model(name, MegatronSP(), 2).graph_module.graph
    scatters = graph.find_nodes(op="call_function", target=torch.ops.sptransform.reduce_scatter.default)
    made_by = Counter("embedding" if "embedding" in x.args[0].name else x.args[0].target for x in scatters)
    assert made_by[torch.ops.aten.linear.default] == 2 * LAYERS
    assert made_by.total() - made_by["embedding"] == 2 * LAYERS
