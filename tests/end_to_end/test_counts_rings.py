"""What rings, gathered keys and Ulysses x ring send: the closed forms, `explain`, and real ranks agree.

Symbols: S tokens, B batch, H query heads, K key/value heads, D head dim, N ranks, U x R of them Ulysses and ring,
c = S/N, e bytes an element, f bytes of what is summed: 8 in float64, else 4.
"""

from __future__ import annotations

import functools
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn import functional

import sptransform
from sptransform import USP, AllGatherKV, Explanation, Ring, Strategy, explanation_of
from sptransform.ops.ring.plan import attended_pairs
from sptransform.sharding.partition import Partition
from tests.support.collective_counts import CountCollectives, by_message
from tests.support.gloo_pool import get_pool
from tests.support.models import HEADS, HIDDEN, LAYERS, Inputs
from tests.support.rewritten import rewritten_model
from tests.support.shapes import build_shape
from tests.support.tiers import tiered

pytestmark = pytest.mark.timeout(240)

B, S, H, D = 2, 64, 8, 4
KEY_HEADS = 4  # of the Llama in tests.support.models
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SOME = [(2, H, torch.bfloat16), (8, 2, torch.float64)]
ALL = [(N, K, dtype) for N in (2, 4, 8) for K in (H, 2) for dtype in DTYPES]
OTHERS = (Ring("contiguous"), Ring(kv="allgather"), Ring("striped", block=8), AllGatherKV("striped"))
ONE_DIM = [(strategy, *case) for strategy in (Ring(), AllGatherKV(), AllGatherKV(regather=True)) for case in ALL]
ONE_DIM += [(strategy, *case) for strategy in OTHERS for case in SOME]
Sent = list[tuple[str, str, int, Fraction]]


class Layer(nn.Module):
    """One attention of `num_key_heads` key heads between linear layers; returns a scalar."""

    def __init__(self, num_key_heads: int) -> None:
        super().__init__()
        self.num_key_heads = num_key_heads
        self.query = nn.Linear(H * D, H * D, bias=False)
        self.key_value = nn.Linear(H * D, 2 * num_key_heads * D, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = self.query(x).unflatten(-1, (H, D)).transpose(1, 2)
        key, value = self.key_value(x).unflatten(-1, (2, self.num_key_heads, D)).permute(2, 0, 3, 1, 4)
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).sum()


def explained(strategy: Strategy, N: int, K: int, dtype: torch.dtype = torch.float64, **options: object) -> Explanation:
    x = torch.ones(B, options.pop("seq_len", S), H * D, dtype=dtype)
    return sptransform.explain(Layer(K).to(dtype), strategy, (x,), world_size=N, **options)


def sent(explanation: Explanation) -> Sent:
    return [(c.kind, c.direction, c.count, Fraction(c.bytes_sent)) for c in explanation.collectives]


def of_all_reduce(num_elements: int, N: int) -> Fraction:
    """Elements: a reduce-scatter and an all-gather."""
    return 2 * num_elements * Fraction(N - 1, N)


def num_parameters(K: int) -> int:
    return (H * D) ** 2 + H * D * 2 * K * D


def ring(N: int, K: int, e: int, f: int) -> tuple[Sent, Sent]:
    block = Fraction(2 * K * B * S * D, N)
    return (
        [("send_recv", "forward", N - 1, block * (N - 1) * e)],
        [("send_recv", "backward", 2 * (N - 1), block * (N - 1) * (e + f))],
    )


def gathered(N: int, K: int, e: int) -> tuple[Sent, Sent]:
    num_bytes = Fraction(2 * K * B * S * D, N) * (N - 1) * e
    return [("all_gather", "forward", 1, num_bytes)], [("reduce_scatter", "backward", 1, num_bytes)]


def regathered(N: int, K: int, e: int) -> tuple[Sent, Sent]:
    forward, backward = gathered(N, K, e)
    return forward, [("all_gather", "backward", 1, forward[0][-1]), *backward]


def ulysses_x_ring(R: int, U: int, K: int, e: int, f: int) -> tuple[Sent, Sent]:
    c = Fraction(S, R * U)
    packed, output = (heads * B * c * D * (1 - Fraction(1, U)) * e for heads in (H + 2 * K, H))
    block = 2 * K * B * c * D * (R - 1)
    forward = [
        ("all_to_all", "forward", 1, packed),
        ("send_recv", "forward", R - 1, block * e),
        ("all_to_all", "forward", 1, output),
    ]
    assert forward[0][-1] + forward[2][-1] == 2 * (H + K) * B * c * D * (1 - Fraction(1, U)) * e
    backward = [
        ("all_to_all", "backward", 1, output),
        ("send_recv", "backward", 2 * (R - 1), block * (e + f)),
        ("all_to_all", "backward", 1, packed),
    ]
    return forward, backward


@pytest.mark.parametrize(("strategy", "N", "K", "dtype"), ONE_DIM, ids=str)
def test_one_mesh_dim(strategy: Strategy, N: int, K: int, dtype: torch.dtype) -> None:
    """Beside attention the loss is summed once, and all gradients in one bucket."""
    e, f = dtype.itemsize, max(dtype.itemsize, 4)
    if strategy == AllGatherKV(regather=True):
        forward, backward = regathered(N, K, e)
    elif isinstance(strategy, AllGatherKV) or strategy.kv == "allgather":
        forward, backward = gathered(N, K, e)
    else:
        forward, backward = ring(N, K, e, f)
    loss = ("all_reduce", "forward", 1, of_all_reduce(1, N) * e)
    gradients = ("all_reduce", "backward", 1, of_all_reduce(num_parameters(K), N) * e)
    assert sent(explained(strategy, N, K, dtype)) == [*forward, _floored(loss), *backward, gradients]


@pytest.mark.covering(ways=1)
@pytest.mark.parametrize(("R", "U", "K"), [(2, 2, 2), (4, 2, 2), (2, 4, 8), (2, 4, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_mesh_dims(R: int, U: int, K: int, dtype: torch.dtype) -> None:
    """The loss is summed over the ring's ranks and then over Ulysses'; gradients in one bucket over all ranks."""
    e, f = dtype.itemsize, max(dtype.itemsize, 4)
    forward, backward = ulysses_x_ring(R, U, K, e, f)
    losses = [_floored(("all_reduce", "forward", 1, of_all_reduce(1, N) * e)) for N in (R, U)]
    gradients = ("all_reduce", "backward", 1, of_all_reduce(num_parameters(K), R * U) * e)
    found = sent(explained(USP(U, R), R * U, K, dtype))
    assert found == [*forward, *losses, *backward, gradients]


def _floored(entry: tuple[str, str, int, Fraction]) -> tuple[str, str, int, Fraction]:
    """Bytes are whole."""
    return (*entry[:-1], Fraction(int(entry[-1])))


def test_repeated_keys_travel_as_they_are() -> None:
    """Hugging Face's Llama repeats its key heads before attention: K of them go round, not H."""
    explanation = explanation_of(rewritten_model("llama_nocache", Ring(), 4))
    block = 2 * KEY_HEADS * B * S // 4 * (HIDDEN // HEADS) * 8
    found = [
        (r.forward.count, r.forward.bytes_sent, r.backward.count, r.backward.bytes_sent) for r in explanation.rings
    ]
    assert found == [(3, 3 * block, 6, 6 * block)] * LAYERS


@pytest.mark.parametrize("N", [2, 4])
def test_layers_send_alike(N: int) -> None:
    model, inputs = build_shape(4, 2, 1, 16, True, num_layers=3)
    hops = [c for c in sptransform.explain(model, Ring(), inputs, world_size=N).collectives if c.kind == "send_recv"]
    expected = [("forward", f"blocks.{i}") for i in range(3)] + [("backward", f"blocks.{i}") for i in (2, 1, 0)]
    assert [(c.direction, c.layer) for c in hops] == expected
    assert len({c.bytes_sent for c in hops if c.direction == "forward"}) == 1


# ---------------------------------------------------------------------------------------------------------------
# What really runs.


def run(
    rank: int, num_ranks: int, strategies: list[Strategy], seq_len: int, num_layers: int
) -> list[tuple[Sent, Sent]]:
    """What a worker does: of each strategy, what is explained and what ran, message by message."""
    found = []
    for strategy in strategies:
        torch._dynamo.reset()
        model, inputs = build_shape(4, 2, 1, seq_len, True, num_layers=num_layers)
        explanation = sptransform.explain(model, strategy, inputs, world_size=num_ranks, rank=rank)
        found.append((sent(explanation), _ran(sptransform.parallelize(model, strategy, backend="aot_eager"), inputs)))
    return found


def _ran(model: nn.Module, inputs: Inputs) -> Sent:
    with CountCollectives() as forward:
        loss = model(**inputs)
    with CountCollectives() as backward:
        loss.backward()
    return [
        (kind, direction, count, Fraction(num_bytes))
        for direction, counted in (("forward", forward), ("backward", backward))
        for kind, count, num_bytes in by_message(counted.collectives)
    ]


@pytest.mark.parametrize(
    ("N", "seq_len", "num_layers", "strategies"),
    tiered(
        [(2, 16, 2, [Ring(), AllGatherKV(regather=True)]), (4, 21, 1, [Ring(), Ring("striped", block=2), USP(2, 2)])],
        quick=[(2, 16, 2, [Ring(), AllGatherKV(regather=True)])],
    ),
    ids=["even", "uneven"],
)
def test_real_ranks_send_what_is_explained(N: int, seq_len: int, num_layers: int, strategies: list[Strategy]) -> None:
    """Hops inside of opaque ops too; keys that are not saved are gathered twice."""
    ranks = get_pool(N).run(run, strategies, seq_len, num_layers, timeout=120)
    for index, strategy in enumerate(strategies):
        for rank, found in enumerate(ranks):
            planned, ran = found[index]
            assert ran == planned, f"{strategy}, rank {rank}"
        kinds = [(kind, direction) for kind, direction, *_ in ran]
        if isinstance(strategy, AllGatherKV):
            assert kinds.count(("all_gather", "forward")) == kinds.count(("all_gather", "backward")) == num_layers
        else:
            assert kinds.count(("send_recv", "forward")) == kinds.count(("send_recv", "backward")) == num_layers
    if seq_len % N:
        assert len({str(found[0]) for found in ranks}) > 1  # shares of different sizes


# ---------------------------------------------------------------------------------------------------------------
# What a rank holds.


class Packed(nn.Module):
    """Causal attention within documents; the model makes its mask [B, 1, S, S] from `documents` [B, S]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D * H, 3 * D * H)

    def forward(self, x: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
        at = torch.arange(x.shape[1])
        mask = (documents[:, :, None] == documents[:, None]) & (at[:, None] >= at)
        return functional.scaled_dot_product_attention(query, key, value, mask[:, None]).sum()


LONG = 400  # no other dimension is as long as a rank's share


@functools.cache
def shapes_on_rank(strategy: Strategy, N: int = 4) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """Of everything the graph of rank 1 computes; a ring's own steps among it."""
    inputs = (torch.ones(1, LONG, H * D, dtype=torch.float64), torch.arange(LONG)[None] // 70)
    explanation = sptransform.explain(Packed().double(), strategy, inputs, world_size=N, rank=1, expand=True)
    graph = explanation.rewritten.graph_module.graph
    values = [node.meta.get("val") for node in graph.nodes if node.op == "call_function"]
    values = [x for value in values for x in (value if isinstance(value, list | tuple) else [value])]
    return [(x.dtype, tuple(x.shape)) for x in values if isinstance(x, torch.Tensor)]


def test_no_tensor_of_queries_x_all_keys() -> None:
    """A mask of a block exists while the block is computed; there is none for all keys of a rank's queries."""
    share = LONG // 4
    for strategy in (Ring(), AllGatherKV(), USP(2, 2)):
        found = {shape for _, shape in shapes_on_rank(strategy) if len(shape) > 1}
        assert not {shape for shape in found if max(shape) >= LONG and sorted(shape)[-2] >= share}, strategy


def test_no_rank_of_a_ring_has_all_keys() -> None:
    def whole(strategy: Strategy) -> set[tuple[int, ...]]:
        return {shape for dtype, shape in shapes_on_rank(strategy) if dtype.is_floating_point and LONG in shape}

    assert whole(AllGatherKV()) == {(1, H, LONG, D)}  # so they would be seen
    assert whole(Ring()) == set()
    assert whole(USP(2, 2)) == set()


@pytest.mark.parametrize("N", [2, 4])
def test_one_block_of_keys_lives_beside_the_one_that_arrives(N: int) -> None:
    """In the graph of hops: from when a message is there, or on its way, until nothing reads what is in it."""
    inputs = (torch.ones(1, LONG, H * D, dtype=torch.bfloat16), torch.arange(LONG)[None] // 70)
    explanation = sptransform.explain(Packed().bfloat16(), Ring(), inputs, world_size=N, expand=True)
    nodes = list(explanation.rewritten.graph_module.graph.nodes)
    at = {node: index for index, node in enumerate(nodes)}

    def last_use(node: torch.fx.Node) -> int:
        ends = [last_use(user) if _is_view(user) else at[user] for user in node.users]
        return max(ends, default=at[node])

    hops = [node for node in nodes if node.target is torch.ops._c10d_functional.all_to_all_single.default]
    assert len(hops) == N - 1
    packed = hops[0].args[0]
    spans = [(at[message], last_use(message)) for message in (packed, *hops)]
    living = [sum(start <= index <= end for start, end in spans) for index in range(len(nodes))]
    assert max(living) == 2
    blocks = [at[node] for node in nodes if node.target is torch.ops.sptransform.attention_block.default]
    assert all(any(start < block < end for block in blocks) for start, end in spans[1:])


_VIEWS = {"getitem", "slice", "split_with_sizes", "transpose", "view", "wait_tensor"}


def _is_view(node: torch.fx.Node) -> bool:
    name = getattr(node.target, "_schema", node.target)
    return getattr(name, "name", getattr(node.target, "__name__", "")).split("::")[-1] in _VIEWS


# ---------------------------------------------------------------------------------------------------------------
# Work.


def imbalance(strategy: Strategy, N: int, seq_len: int) -> Fraction:
    """The most pairs of query and key that a rank attends, over the mean, less 1; of the graph the strategy made."""
    graph = explained(strategy, N, 2, seq_len=seq_len).rewritten.graph_module.graph
    (node,) = graph.find_nodes(op="call_function", target=torch.ops.sptransform.ring_attention.default)
    queries = Partition.parse(node.kwargs["queries"])
    keys, limits = ((0, seq_len),), (node.kwargs["nearest"], node.kwargs["farthest"])
    pairs = [attended_pairs(own, keys, *limits) for own in queries.owned]
    assert sum(pairs) == seq_len * (seq_len + 1) // 2
    return Fraction(max(pairs) * N, sum(pairs)) - 1


@pytest.mark.parametrize("N", [2, 4, 8])
def test_balance_under_a_causal_mask(N: int) -> None:
    c = S // N
    assert imbalance(Ring(), N, S) == imbalance(AllGatherKV(), N, S) == 0
    assert imbalance(Ring("contiguous"), N, S) == imbalance(AllGatherKV("contiguous"), N, S) == Fraction(S - c, S + 1)


def test_balance_where_ranks_do_not_divide() -> None:
    assert 0 < imbalance(Ring(), 4, 403) < Fraction(1, 100)
