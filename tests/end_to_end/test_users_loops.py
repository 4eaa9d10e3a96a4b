"""Loops of users: several forwards before a backward, reference models, parts of models, activations on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

import sptransform
from sptransform import CaptureError
from tests.support.gloo_pool import get_pool
from tests.support.tiers import tiered
from tests.support.tiny import AttentionWithLoss, attention, token_inputs

pytestmark = pytest.mark.timeout(240)
EXACT = 1e-12
Step = Callable[[nn.Module, nn.Module], Tensor]


class Model(AttentionWithLoss):
    """Loss and logits; logits alone without labels."""

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Any:
        logits = super(AttentionWithLoss, self).forward(tokens)
        if labels is None:
            return logits
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


def model(seed: int) -> Model:
    torch.manual_seed(seed)
    return Model().double()


def inputs(seq_len: int, seed: int = 0) -> dict[str, Tensor]:
    shift = {name: x.roll(seed, 0)[:, :seq_len] for name, x in token_inputs().items()}
    return {name: x.roll(3 * seed, 1) for name, x in shift.items()}


def two_forwards(policy: nn.Module, reference: nn.Module) -> Tensor:
    first, _ = policy(**inputs(16))
    second, _ = policy(**inputs(16, seed=1))
    return (first - 2 * second).square()


def shapes_between(policy: nn.Module, reference: nn.Module) -> Tensor:
    """A shorter batch, and evaluations of yet other lengths, between forward and backward."""
    first, _ = policy(**inputs(16))
    with torch.no_grad():
        evaluated = policy(**inputs(8))[0] * policy.eval()(**inputs(10))[0]
    policy.train()
    return first * policy(**inputs(12))[0] * evaluated


def log_probabilities(any_model: nn.Module, tokens: Tensor) -> Tensor:
    return any_model(tokens)[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1).sum(-1)


def preference(policy: nn.Module, reference: nn.Module) -> Tensor:
    """DPO; the pair is a batch of two, and then two calls."""
    tokens = inputs(16)["tokens"]
    with torch.no_grad():
        expected = log_probabilities(reference, tokens)
    found = log_probabilities(policy, tokens) - expected
    apart = [log_probabilities(policy, row) for row in tokens.chunk(2)]
    return -functional.logsigmoid(0.1 * (found[0] - found[1])) + (apart[0] / apart[1]).sum()


def distillation(policy: nn.Module, reference: nn.Module) -> Tensor:
    loss, logits = policy(**inputs(16))
    with torch.no_grad():
        taught = reference(inputs(16)["tokens"])
    return loss + functional.kl_div(logits.log_softmax(-1), taught.log_softmax(-1), log_target=True, reduction="sum")


def rewards(policy: nn.Module, reference: nn.Module) -> Tensor:
    chosen, rejected = (policy(inputs(16, seed)["tokens"])[:, -1].mean(-1) for seed in (0, 1))
    return -functional.logsigmoid(chosen - rejected).mean()


def saved_on_the_host(policy: nn.Module, reference: nn.Module) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return policy(**inputs(16))[0]


STEPS: tuple[Step, ...] = (two_forwards, shapes_between, preference, distillation, rewards, saved_on_the_host)


def stepped(policy: nn.Module, reference: nn.Module, steps: tuple[Step, ...]) -> list[list[Tensor]]:
    """Loss and gradients of each step."""
    found = []
    for step in steps:
        policy.zero_grad()
        loss = step(policy, reference)
        loss.backward()
        grads = [x.grad for x in policy.parameters()]
        found.append([x.full_tensor() if isinstance(x, DTensor) else x.clone() for x in (loss.detach(), *grads)])
    return found


def on_ranks(rank: int, world_size: int, options: dict[str, Any], of_reference: str | None, steps: Any) -> Any:
    policy, reference = model(0), model(1).requires_grad_(False)
    sptransform.parallelize(policy, backend="aot_eager", **options)
    if of_reference is not None:
        outputs = options.get("outputs", "dtensor")
        sptransform.parallelize(reference, of_reference, backend="aot_eager", outputs=outputs)
    return stepped(policy, reference, steps)


CASES = [
    (options, reference)
    for options in (
        {"strategy": "ulysses"},
        {"strategy": "megatron"},
        {"strategy": "ring", "shard_parameters": True},
        {"strategy": "ulysses", "outputs": "full"},
    )
    for reference in (None, "ulysses", "megatron")
]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "reference"), CASES, ids=str)
def test_steps(options: dict[str, Any], reference: str | None) -> None:
    expected = stepped(model(0), model(1).requires_grad_(False), STEPS)
    for found in get_pool(2).run(on_ranks, options, reference, STEPS, timeout=200):
        for step, got, true in zip(STEPS, found, expected, strict=True):
            for x, y in zip(got, true, strict=True):
                torch.testing.assert_close(x, y, rtol=EXACT, atol=EXACT, msg=lambda m, s=step: f"{s.__name__}: {m}")


def of_own_tokens(any_model: nn.Module, tokens: Tensor) -> Tensor:
    """As :func:`log_probabilities` where a rank gets logits of its tokens only, and of the sum adds its own terms."""
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    following = tokens.roll(-1, 1)
    following[:, -1] = -100
    logits = any_model(tokens)
    own = following.chunk(num_ranks, 1)[rank]
    terms = -functional.cross_entropy(logits.mT, own, reduction="none").sum(-1)
    total = terms.detach().clone()
    torch.distributed.all_reduce(total)
    return total + (terms - terms.detach())  # whose gradient is that of the terms: parameters' are summed in the graph


def preference_of_parts(policy: nn.Module, reference: nn.Module, seq_len: int, of: Any) -> list[Tensor]:
    """DPO's loss of a pair of answers, and the gradients."""
    tokens = inputs(seq_len)["tokens"]
    with torch.no_grad():
        expected = of(reference, tokens)
    found = of(policy, tokens) - expected
    loss = -functional.logsigmoid(0.1 * (found[0] - found[1]))
    loss.backward()
    grads = [x.grad for x in policy.parameters()]
    return [x.full_tensor() if isinstance(x, DTensor) else x for x in (loss.detach(), *grads)]


def local_outputs(rank: int, world_size: int, options: dict[str, Any], seq_len: int) -> list[Tensor]:
    policy, reference = model(0), model(1).requires_grad_(False)
    for each in (policy, reference):
        sptransform.parallelize(each, backend="aot_eager", outputs="local", **options)
    return preference_of_parts(policy, reference, seq_len, of_own_tokens)


@pytest.mark.slow
@pytest.mark.parametrize("seq_len", [16, 13])
@pytest.mark.parametrize(
    "options", [{"strategy": "ulysses"}, {"strategy": "ring"}, {"strategy": "ring", "shard_parameters": True}], ids=str
)
def test_preference_of_local_outputs(options: dict[str, Any], seq_len: int) -> None:
    expected = preference_of_parts(model(0), model(1), seq_len, log_probabilities)
    for found in get_pool(2).run(local_outputs, options, seq_len):
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=EXACT, atol=EXACT)


class Offloaded(AttentionWithLoss):
    """Keeps its activations on the host by itself."""

    def between(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return x.sin()


def offloads(rank: int, world_size: int) -> str:
    parallel = sptransform.parallelize(Offloaded().double(), "ulysses", backend="aot_eager")
    with pytest.raises(CaptureError) as error:
        parallel(**token_inputs())
    return str(error.value)


@pytest.mark.slow
def test_saved_elsewhere_inside_of_the_model() -> None:
    for text in get_pool(2).run(offloads, timeout=100):
        assert "with torch.autograd.graph.save_on_cpu(): model(..)" in text and "test_users_loops.py" in text


# --- a part of a model ------------------------------------------------------------------------------------------


class Around(nn.Module):
    """A model whose embedding is read, and whose head and loss are, outside of the part that is parallelized."""

    def __init__(self, is_tied: bool) -> None:
        super().__init__()
        self.inner = Inner()
        self.project = nn.Linear(5, 16)
        self.head = nn.Linear(16, self.inner.tokens.num_embeddings, bias=False)
        if is_tied:
            self.head.weight = self.inner.tokens.weight

    def forward(self, tokens: Tensor, labels: Tensor, image: Tensor) -> Tensor:
        x = torch.cat([self.project(image), self.inner.tokens(tokens)[:, image.shape[1] :]], 1)
        logits = self.head(self.inner(x))
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Inner(nn.Module):
    """Attention over what is embedded already; its own embedding is for others to call."""

    def __init__(self) -> None:
        super().__init__()
        self.written = attention()
        self.tokens = self.written.tokens
        self.written.tokens, self.written.head = nn.Identity(), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq_len, width = x.shape
        query, key, value = self.written.qkv(x).view(batch, seq_len, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return x + self.written.head(attended.transpose(1, 2).reshape(x.shape))


def around(is_tied: bool) -> tuple[Around, dict[str, Tensor]]:
    torch.manual_seed(0)
    image = torch.randn(2, 4, 5, dtype=torch.float64)
    return Around(is_tied).double(), {**token_inputs(), "image": image}


def part(rank: int, world_size: int, is_tied: bool, options: dict[str, Any]) -> list[Tensor]:
    whole, given = around(is_tied)
    sptransform.parallelize(whole.inner, backend="aot_eager", **options)
    if is_tied:
        whole.head.weight = whole.inner.tokens.weight
    (found,) = stepped(whole, whole, (lambda own, _: own(**given),))
    return found


WAYS = [
    {"strategy": "megatron"},
    {"strategy": "megatron", "outputs": "full"},
    {"strategy": "ulysses", "shard_parameters": True},
    {"strategy": "ulysses", "shard_parameters": True, "outputs": "full"},
    {"strategy": "ring"},
]


@pytest.mark.parametrize(
    ("is_tied", "options"),
    tiered([(tied, way) for tied in (True, False) for way in WAYS], quick=[(True, WAYS[2])]),
    ids=str,
)
def test_a_part_of_a_model(is_tied: bool, options: dict[str, Any]) -> None:
    whole, given = around(is_tied)
    (expected,) = stepped(whole, whole, (lambda own, _: own(**given),))
    for found in get_pool(2).run(part, is_tied, options, timeout=150):
        for got, true in zip(found, expected, strict=True):
            torch.testing.assert_close(got, true, rtol=EXACT, atol=EXACT)


def tied_before(rank: int, world_size: int) -> str:
    whole, given = around(True)
    sptransform.parallelize(whole.inner, "ulysses", shard_parameters=True, backend="aot_eager")
    with pytest.raises(sptransform.UsageError) as error:
        whole(**given)
    return str(error.value)


@pytest.mark.slow
def test_what_was_tied_before_says_so() -> None:
    for text in get_pool(2).run(tied_before, timeout=100):
        assert "tie a module outside of the model" in text
