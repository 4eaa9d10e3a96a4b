"""Attention spelled out becomes the node that strategies place, with the values and gradients it had."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import sptransform
from sptransform import UsageError
from sptransform.compiler.options import Options
from sptransform.compiler.rewrite import rewrite_graph
from sptransform.graph.printer import text
from sptransform.op_rules.attention import ATTENTION
from sptransform.passes.normalize.recognize_attention import RecognizeAttention
from sptransform.sharding.mesh import Mesh
from tests.support.equality import assert_equal_to_one_device, run_one_device
from tests.support.golden import Golden
from tests.support.graphs import after, nodes_of, while_captured
from tests.support.models import FLOAT32_PARTS, FLOAT64
from tests.support.rewritten import Asked, on_pretended_ranks
from tests.support.tiers import tiered

aten = torch.ops.aten
BATCH, LENGTH, HEADS, WIDTH = 2, 12, 4, 3
HIDDEN = HEADS * WIDTH
Attend = Callable[..., Tensor]


def hidden_keys() -> Tensor:
    """Later keys, as booleans."""
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)


# --- spellings of [batch, heads, sequence, width] -----------------------------------------------------------------


def textbook(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(q.shape[-1]))
    return scores.masked_fill(hidden_keys(), float("-inf")).softmax(-1) @ v


def scaled_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q / 2.0, k.transpose(2, 3) * 0.5)
    return torch.matmul(torch.where(hidden_keys(), float("-inf"), scores).softmax(-1), v)


def mask_before_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(LENGTH, LENGTH, dtype=q.dtype).masked_fill(hidden_keys(), -1e4)
    return functional.softmax((q @ k.mT + mask) / math.sqrt(WIDTH), dim=3) @ v


def lowest_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A row of which everything is hidden is a mean of all values."""
    hidden = hidden_keys() | (torch.arange(LENGTH)[:, None] == 3)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k)
    return torch.where(~hidden, scores, torch.finfo(scores.dtype).min).softmax(-1) @ v


def without_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT / torch.full([], math.sqrt(WIDTH), dtype=q.dtype)
    scores = scores - scores.amax(-1, keepdim=True).detach()
    return scores.softmax(-1) @ v


def two_masks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    distance = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).to(q.dtype)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=q.dtype)[:, None, None]
    scores = q @ k.mT * 0.7 - distance * slopes
    scores = scores.masked_fill(hidden_keys(), float("-inf")).masked_fill(distance > 7, float("-inf"))
    return scores.softmax(-1) @ v


def cast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    probabilities = functional.softmax(q @ k.mT, dim=-1, dtype=torch.float64).to(q.dtype)
    return functional.dropout(probabilities, 0.1, training=False) @ v


def flat_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads and batch as one dimension, apart where the mask is added."""
    q, k, v = (x.reshape(BATCH * HEADS, LENGTH, WIDTH) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(BATCH, HEADS, LENGTH, LENGTH)
    mask = torch.zeros(BATCH, 1, LENGTH, LENGTH, dtype=q.dtype).masked_fill(hidden_keys(), float("-inf"))
    probabilities = (scores + mask).view(BATCH * HEADS, LENGTH, LENGTH).softmax(-1)
    return torch.bmm(probabilities, v).view(BATCH, HEADS, LENGTH, WIDTH)


def biased_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.reshape(BATCH * HEADS, LENGTH, WIDTH) for x in (q, k, v))
    bias = torch.zeros(BATCH * HEADS, LENGTH, LENGTH, dtype=q.dtype).masked_fill(hidden_keys(), float("-inf"))
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=0.4)
    return torch.bmm(scores.softmax(-1), v).view(BATCH, HEADS, LENGTH, WIDTH)


def keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores with keys in rows, softmax over them."""
    scores = (k @ q.mT * 0.5).masked_fill(hidden_keys().T, float("-inf"))
    return torch.einsum("bhkq,bhkd->bhqd", scores.softmax(-2), v)


def tempered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A scale that only the run knows, of queries and keys in another precision than the values."""
    temperature = v.detach().square().mean() + 0.5
    scores = q.to(torch.float32) @ k.to(torch.float32).mT / temperature.to(torch.float32)
    scores = scores.masked_fill(hidden_keys(), torch.finfo(torch.float32).min)
    return scores.softmax(-1).to(v.dtype) @ v


def cosine(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each head has a scale of its own, as in Swin 2, and each query."""
    lengths = q.square().mean(-1, keepdim=True) + 0.5
    scores = functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).mT
    scores = scores * torch.linspace(0, 2, HEADS, dtype=q.dtype)[:, None, None].exp() / lengths
    return scores.masked_fill(hidden_keys(), float("-inf")).softmax(-1) @ v


def sequence_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.permute(2, 0, 1, 3) for x in (q, k, v))  # [sequence, batch, heads, width]
    scores = torch.einsum("sbhd,tbhd->bsht", q, k) * 0.3
    scores = scores.masked_fill(hidden_keys()[None, :, None, :], float("-inf"))
    return torch.einsum("bsht,tbhe->bhse", scores.softmax(-1), v)


def row_of_low_numbers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of a row all keys are masked by adding a number that swallows the scores."""
    hidden = hidden_keys() | (torch.arange(LENGTH)[:, None] == 3)
    mask = torch.zeros(LENGTH, LENGTH, dtype=q.dtype).masked_fill(hidden, torch.finfo(q.dtype).min)
    return (q @ k.mT + mask).softmax(-1) @ v


def unread_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.reshape(BATCH * HEADS, LENGTH, WIDTH) for x in (q, k, v))
    bias = torch.full((BATCH * HEADS, LENGTH, LENGTH), math.nan, dtype=q.dtype)
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), beta=0, alpha=0.4)
    return torch.bmm(scores.softmax(-1), v).view(BATCH, HEADS, LENGTH, WIDTH)


def masks_of_other_kinds(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of one dimension or none, of booleans and whole numbers."""
    scores = q @ k.mT - (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs() / math.sqrt(3)
    scores = scores + hidden_keys() + hidden_keys()
    scores = scores.masked_fill(torch.arange(LENGTH) % 5 == 4, float("-inf"))
    return scores.masked_fill(q.detach().sum() > 1e9, float("-inf")).softmax(-1) @ v


def heads_in_groups(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads as two dimensions, and a mask that has one of them."""
    q, k, v = (x.unflatten(1, (2, 2)) for x in (q, k, v))
    bias = torch.arange(2 * LENGTH * LENGTH, dtype=q.dtype).view(2, 1, LENGTH, LENGTH).sin()
    return ((q @ k.mT + bias).softmax(-1) @ v).flatten(1, 2)


def negative_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By distance: kernels that hide keys before they scale would show nothing but those."""
    return (q @ k.mT * -0.5).masked_fill(hidden_keys(), float("-inf")).softmax(-1) @ v


SPELLINGS: list[Attend] = [
    textbook, scaled_before, mask_before_scale, lowest_number, without_maximum, two_masks, cast, flat_heads,
    biased_product, keys_first, sequence_first, tempered, cosine,
    row_of_low_numbers, unread_bias, masks_of_other_kinds, heads_in_groups, negative_scale,
]  # fmt: skip


class Model(nn.Module):
    """One attention, spelled somehow, and a loss."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend = attend
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).view(BATCH, -1, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        y = self.attend(*parts).transpose(1, 2).reshape(BATCH, -1, HIDDEN)
        return (x + self.out(y)).square().sum(-1).sin().mean()


def inputs() -> dict[str, Tensor]:
    return {"x": torch.randn(BATCH, LENGTH, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}


def attentions(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.target in ATTENTION]


STRATEGIES = [Asked(2, "ulysses"), Asked(3, "ring"), Asked(2, "allgather"), Asked(2, "megatron"), Asked((2, 2), "usp")]


@pytest.mark.parametrize(
    "attend",
    tiered(SPELLINGS, quick=[each for each in SPELLINGS if each not in (cosine, negative_scale)]),
    ids=lambda attend: attend.__name__,
)
def test_a_spelling_is_recognised_and_exact(attend: Attend) -> None:
    model = Model(attend)
    gm, _ = after([RecognizeAttention()], model, inputs()["x"])
    assert len(attentions(gm)) == 1 and not nodes_of(gm, aten.softmax.int)
    reference = run_one_device(model, inputs())
    for asked, ranks in on_pretended_ranks(model, inputs(), STRATEGIES).items():
        assert ranks.context.result.fallbacks == [], asked
        for result in ranks.results():
            assert_equal_to_one_device(reference, result, FLOAT32_PARTS if attend is tempered else FLOAT64)


def test_a_maximum_along_queries_is_no_constant() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        return (scores - 0.5 * scores.amax(-2, keepdim=True)).softmax(-1) @ v

    def subtracted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        return (scores - scores.amax(-2, keepdim=True)).softmax(-1) @ v

    for each in (attend, subtracted):
        reference = run_one_device(Model(each), inputs())
        (ranks,) = on_pretended_ranks(Model(each), inputs(), [Asked(2, "ulysses")]).values()
        for result in ranks.results():
            assert_equal_to_one_device(reference, result, FLOAT64)


def test_what_it_costs_is_what_attention_costs() -> None:
    """Two all-to-alls forward and two backward, nothing gathered."""
    for attend in (textbook, flat_heads, sequence_first):
        page = sptransform.explain(Model(attend), "ulysses", inputs(), world_size=2)
        kinds = [(x.direction, x.kind) for x in page.collectives if x.kind != "all_reduce"]
        assert kinds == [("forward", "all_to_all")] * 2 + [("backward", "all_to_all")] * 2, attend.__name__
        assert page.gathered == () and page.fallbacks == ()


def test_heads_are_found_in_a_batch_of_heads() -> None:
    gm, _ = after([RecognizeAttention()], Model(flat_heads), inputs()["x"])
    (attention,) = attentions(gm)
    assert attention.meta["val"].shape == (BATCH, HEADS, LENGTH, WIDTH)


def test_nothing_of_the_scores_is_left(golden: Golden) -> None:
    gm, _ = after([RecognizeAttention()], Model(two_masks), inputs()["x"])
    golden.check("recognize_attention", after=text(list(gm.graph.nodes)[-24:]))


def test_dropout_is_an_argument() -> None:
    def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.dropout((q @ k.mT).softmax(-1), 0.25) @ v

    gm, _ = after([RecognizeAttention()], Model(dropped), inputs()["x"])
    (attention,) = attentions(gm)
    assert attention.args[4] == 0.25 and not nodes_of(gm, aten.dropout.default)


class OfTorch(nn.Module):
    """torch's own module, which returns its probabilities too, read or not."""

    def __init__(self, is_read: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.is_read = is_read
        self.attention = nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(LENGTH, LENGTH, dtype=x.dtype).masked_fill(hidden_keys(), float("-inf"))
        y, probabilities = self.attention(x, x, x, attn_mask=mask)
        return (y.square().sum() + (probabilities.square().sum() if self.is_read else 0.0)) / LENGTH


@pytest.mark.parametrize("is_read", [False, True])
def test_torchs_own_module_is_exact(is_read: bool) -> None:
    reference = run_one_device(OfTorch(is_read), inputs())
    for ranks in on_pretended_ranks(OfTorch(is_read), inputs(), STRATEGIES[:3]).values():
        for result in ranks.results():
            assert_equal_to_one_device(reference, result, 1e-12)


@pytest.mark.parametrize("is_read", [False, True])
def test_probabilities_that_are_read_too_stay_open(is_read: bool) -> None:
    """Only for their reader; and what is gathered for them is reported."""
    gm, _ = after([RecognizeAttention()], OfTorch(is_read), inputs()["x"])
    assert len(attentions(gm)) == 1 and len(nodes_of(gm, aten.softmax.int)) == is_read
    explanation = sptransform.explain(OfTorch(is_read), "ulysses", inputs(), world_size=2)
    assert bool(explanation.gathered) == is_read


@pytest.mark.slow
def test_lengths_stay_open() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.5).softmax(-1) @ v

    def rewritten(gm: fx.GraphModule, found: list[object]) -> fx.GraphModule:
        return rewrite_graph(gm, found, Options(), Mesh.pretended(2))[0]

    x = inputs()["x"]
    torch._dynamo.mark_dynamic(x, 1)
    (attention,) = attentions(while_captured(Model(attend), rewritten, x))
    assert isinstance(attention.meta["val"].shape[2], torch.SymInt)


class Biased(nn.Module):
    """Attention under a bias that is learned, and another one that says what is the sequence."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bias = nn.Parameter(torch.randn(HEADS, LENGTH, LENGTH, dtype=torch.float64))
        self.first, self.second = Model(self.attend), Model(functional.scaled_dot_product_attention)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT + self.bias).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


@pytest.mark.slow
def test_a_mask_that_is_learned_is_exact() -> None:
    """Also where masks are read by position."""
    reference = run_one_device(Biased(), inputs())
    for ranks in on_pretended_ranks(Biased(), inputs(), STRATEGIES[:3]).values():
        for result in ranks.results():
            assert_equal_to_one_device(reference, result, FLOAT64)


def test_a_length_among_the_scores_is_no_number() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / q.shape[2] + q.shape[2]).softmax(-1) @ v

    x = inputs()["x"]
    torch._dynamo.mark_dynamic(x, 1)
    with pytest.raises(UsageError, match="is not between two products"):
        sptransform.rewrite(Model(attend), "ulysses", {"x": x}, world_size=2)


# --- what is none -------------------------------------------------------------------------------------------------


def read_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What is dropped is drawn once for both readers."""
    probabilities = functional.dropout((q @ k.mT).softmax(-1), 0.25)
    return probabilities @ v + probabilities.square().sum(-1, keepdim=True)


def of_two_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    probabilities = (q @ k.mT).softmax(-1)
    return probabilities @ v + probabilities @ (v + 1)


def filled_with_another_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(hidden_keys(), -1e4).softmax(-1) @ v


def scaled_by_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * torch.arange(LENGTH)).softmax(-1) @ v


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-2) @ v


def values_of_a_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    values = torch.ones(LENGTH, LENGTH, WIDTH, dtype=q.dtype)
    return torch.einsum("bhqk,qkd->bhqd", (q @ k.mT).softmax(-1), values) + v


def detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).detach().softmax(-1) @ v


def detached_probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).detach() @ v


def partly_without_gradients(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    with torch.no_grad():
        scores = scores * 0.5
    return scores.softmax(-1) @ v


def rounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).to(torch.int32).to(q.dtype).softmax(-1) @ v


def lowest_then_nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(torch.arange(LENGTH) < 2, torch.finfo(q.dtype).min)
    return scores.masked_fill(hidden_keys(), float("-inf")).softmax(-1) @ v


def lowest_and_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(hidden_keys(), torch.finfo(q.dtype).min)
    return (scores + torch.arange(LENGTH, dtype=q.dtype)).softmax(-1) @ v


def lowest_under_what_is_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A query whose other keys are hidden by what is added is a mean of the keys that are filled."""
    scores = q @ k.mT + torch.full((LENGTH, LENGTH), float("-inf"), dtype=q.dtype).triu(1)
    return scores.masked_fill(torch.arange(LENGTH) < 3, torch.finfo(q.dtype).min).softmax(-1) @ v


def shared_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Which dimension of the queries is the sequence, nothing says."""
    return torch.einsum("bhqk,bkd->bhqd", torch.einsum("bhqd,bkd->bhqk", q, k[:, 0]).softmax(-1), v[:, 0])


@pytest.mark.parametrize(
    "attend",
    [detached, detached_probabilities, partly_without_gradients, rounded, lowest_then_nothing, lowest_and_added,
     lowest_under_what_is_added, shared_keys, read_twice, of_two_values, filled_with_another_number, over_queries,
     scaled_by_keys,
     values_of_a_query],
    ids=lambda attend: attend.__name__,
)  # fmt: skip
def test_what_is_no_attention_is_left(attend: Attend) -> None:
    gm, _ = after([RecognizeAttention()], Model(attend), inputs()["x"])
    assert not attentions(gm)
    with pytest.raises(UsageError, match=r"aten\.softmax\.int is not between two products"):
        sptransform.rewrite(Model(attend), "ulysses", inputs(), world_size=2)


class Table(nn.Module):
    """A soft lookup in a table of parameters beside attention: no keys, no values."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model(textbook)
        self.keys, self.table = (nn.Parameter(torch.randn(BATCH, 5, HIDDEN, dtype=torch.float64)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x + (x @ self.keys.mT).softmax(-1) @ self.table)


def test_a_table_of_parameters_is_no_attention() -> None:
    gm, _ = after([RecognizeAttention()], Table(), inputs()["x"])
    assert len(attentions(gm)) == 1 == len(nodes_of(gm, aten.softmax.int))
