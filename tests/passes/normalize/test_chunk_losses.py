"""Losses whose logits exist for a chunk of tokens: the same values and gradients, however the head is written."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sptransform import MegatronSP, Ring, Ulysses
from sptransform.graph import dataflow
from sptransform.graph.printer import text
from sptransform.ops.logit_sums import logit_sums, logit_sums_backward
from sptransform.passes.normalize import chunk_losses
from sptransform.passes.normalize.chunk_losses import ChunkLosses
from tests.passes.blocks import BATCH, HIDDEN, LENGTH, hidden_states
from tests.support.golden import Golden
from tests.support.graphs import a_context, after, assert_ranks_equal_one_device, captured, nodes_of, on_ranks
from tests.support.heads import CLASSES, HEADS, Loss, WithLoss, padded, some_labels, with_z_loss
from tests.support.tiers import tiered

lce = torch.ops.sptransform.linear_cross_entropy.default
RANKS = [(Ulysses(), 2), (Ring(), 3), (MegatronSP(), 2), (MegatronSP(), 3)]


def assert_equal_in_chunks(model: nn.Module, strategy: Any, num_ranks: int, **options: Any) -> None:
    """All logits come in chunks, under MegatronSP of a part of the classes; and the ranks equal one device."""
    options = {"strategy": strategy, "num_ranks": num_ranks, "loss_chunk": 3} | options
    reference, ranks, graphs = on_ranks(model, hidden_states(), some_labels(), **options)
    assert_ranks_equal_one_device(reference, ranks)
    for gm in graphs:
        (node,) = nodes_of(gm, lce)
        assert bool(node.kwargs.get("classes")) == isinstance(strategy, MegatronSP)


# the sharpest on the quick tier: two readers of classes that are cut
@pytest.mark.parametrize(
    ("head", "ranks"),
    tiered(
        [(head, ranks) for head in HEADS for ranks in RANKS],
        quick=[("with_z_loss", RANKS[2])],
    ),
)
def test_every_head(head: str, ranks: tuple[Any, int]) -> None:
    assert_equal_in_chunks(WithLoss(HEADS[head]), *ranks)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["plain", "fewer_classes", "of_torch", "of_torch_in_chunks"])
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_a_bias(head: str, ranks: tuple[Any, int]) -> None:
    assert_equal_in_chunks(WithLoss(HEADS[head], bias=True), *ranks, backend="aot_eager")


class Checkpointed(nn.Module):
    """The head's logits are recomputed by the user, too."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.inner = WithLoss(loss)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = checkpoint(self.inner.attention, x, use_reentrant=False)
        return checkpoint(self.inner.loss, self.inner.head, x, labels, use_reentrant=False)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_checkpointed(ranks: tuple[Any, int]) -> None:
    assert_equal_in_chunks(Checkpointed(with_z_loss), *ranks, backend="aot_eager")


class Autocast(nn.Module):
    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.inner = WithLoss(loss).float()

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x, labels)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["plain", "with_z_loss", "looked_up"])
def test_autocast(head: str) -> None:
    """Logits have 16 bits, as on one device; sums of them, and gradients of the weight, are in float32."""
    x = hidden_states().detach().float().requires_grad_()
    exact, _, _ = on_ranks(WithLoss(HEADS[head]), hidden_states(), some_labels(), num_ranks=2)
    model = Autocast(HEADS[head])
    reference, ranks, graphs = on_ranks(model, x, some_labels(), num_ranks=2, loss_chunk=3, backend="aot_eager")
    assert all(len(nodes_of(gm, lce)) == 1 for gm in graphs)
    for rank in ranks:
        for got, one, truth in zip(rank.grads, reference.grads, exact.grads, strict=True):
            if truth is not None:
                size = float(truth.abs().max())
                assert got.dtype == one.dtype
                assert float((got - truth).abs().max()) <= max(2 * float((one - truth).abs().max()), 0.01 * size)


def test_golden(golden: Golden) -> None:
    """Of two readers of the same tokens, and the casts and moves between."""
    head = nn.Linear(HIDDEN, CLASSES, bias=False)

    def loss(x: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        logits = functional.linear(x, weight).float()
        losses = functional.cross_entropy(logits[:, 1:].flatten(0, 1), labels[:, :-1].flatten(), reduction="sum")
        return losses + logits[:, 1:].logsumexp(-1).square().sum()

    inputs = hidden_states().detach().bfloat16(), some_labels(), head.weight.detach().bfloat16()
    before, _ = captured(loss, *inputs)
    done, _ = after((ChunkLosses(),), loss, *inputs, context=a_context(loss_chunk=4))
    golden.check("chunk_losses", before=text(before.graph.nodes), after=text(done.graph.nodes))


# --- what is left as it is ---------------------------------------------------------------------------------------


def returned(head: nn.Linear, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = head(x)
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


def read_by_others(head: nn.Linear, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = head(x)
    correct = (logits.argmax(-1) == labels).sum()
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), correct


def trained_scale(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    logits = head(x) * head.weight.sum()
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def normed(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    logits = functional.layer_norm(head(x), (CLASSES,))
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def other_tokens(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    """The second loss is of tokens of its own, without labels."""
    logits = head(x)
    loss = functional.cross_entropy(logits[:, 1:].flatten(0, 1), labels[:, 1:].flatten())
    return loss + logits.logsumexp(-1).mean()


def two_labels(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    logits = head(x).flatten(0, 1)
    return functional.cross_entropy(logits, labels.flatten()) + functional.cross_entropy(logits, 12 - labels.flatten())


def detached(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    logits = head(x)
    loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return loss * functional.cross_entropy(logits.detach().flatten(0, 1), labels.flatten())


def read_for_its_dtype(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    logits = head(x)
    loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return loss + functional.cross_entropy(x.type_as(logits).flatten(0, 1), labels.flatten().clamp(max=HIDDEN - 1))


LEFT = [read_for_its_dtype, returned, read_by_others, trained_scale, normed, other_tokens, two_labels, detached]


@pytest.mark.slow
@pytest.mark.parametrize("loss", LEFT, ids=lambda loss: loss.__name__)
def test_what_needs_all_logits_is_left(loss: Loss, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, chunk_losses.__name__)
    gm, _ = after(ChunkLosses, WithLoss(loss), hidden_states(), some_labels(), context=a_context(loss_chunk=3))
    assert nodes_of(gm, torch.ops.aten.cross_entropy_loss.default) and not nodes_of(gm, lce)
    assert "exist for all tokens at once" in caplog.text or loss in (trained_scale, normed)  # their loss is not found
    assert "has no effect" in caplog.text


@pytest.mark.slow
def test_probabilities_are_left() -> None:
    target = torch.rand(BATCH * LENGTH, CLASSES, dtype=torch.float64).softmax(-1)

    def loss(head: nn.Linear, x: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(head(x).flatten(0, 1), target)

    gm, _ = after(ChunkLosses, WithLoss(loss), hidden_states(), target, context=a_context(loss_chunk=3))
    assert not nodes_of(gm, lce)


# --- when --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_where_memory_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 tokens of 13 classes, in float64, on two ranks: 832 bytes a rank."""
    gm, _ = captured(WithLoss(padded), hidden_states(), some_labels())
    (logits,) = [x for x in nodes_of(gm, torch.ops.aten.linear.default) if dataflow.shape(x)[-1] == CLASSES]

    def chunk_of(chunk: Any, num_ranks: int = 2) -> int | None:
        return chunk_losses.chunk_size(logits, a_context(num_ranks, loss_chunk=chunk))

    def limits(large: int, chunk: int, fewest: int) -> None:
        for name, value in (("LARGE", large), ("CHUNK", chunk), ("FEWEST", fewest)):
            monkeypatch.setattr(chunk_losses, name, value)

    assert chunk_of("auto") is None and chunk_of(5) == 5
    limits(832, 4 * 104, 1)
    assert chunk_of("auto") == 4
    assert chunk_of("auto", num_ranks=4) is None  # its share is below
    limits(833, 4 * 104, 1)
    assert chunk_of("auto") is None
    limits(832, 4 * 104, 8)
    assert chunk_of("auto") is None  # one chunk


class Largest(TorchDispatchMode):
    """The largest result of any op."""

    def __init__(self) -> None:
        super().__init__()
        self.num_entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, list | tuple) else [result]:
            if isinstance(x, Tensor):
                self.num_entries = max(self.num_entries, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.fixture
def kernels() -> Iterator[Largest]:
    with Largest() as found:
        yield found


def test_no_tensor_is_larger_than_a_chunk(kernels: Largest) -> None:
    """Forward and backward, with a softcap between: tokens x classes is 4 times chunk x classes here."""
    tokens, classes, chunk = 64, 128, 16
    x, weight, labels = torch.randn(tokens, 8), torch.randn(classes, 8), torch.randint(classes, (tokens,))
    program = "%1 = div.Tensor(%0, 5.0); %2 = tanh(%1); %3 = mul.Tensor(%2, 5.0)"
    options: dict[str, Any] = {"program": program, "chunk": chunk, "summed": True}
    largest, logsum, *_ = logit_sums(x, weight, labels, None, [], **options)
    grads = [torch.ones(tokens)] * 3
    logit_sums_backward(
        x, weight, labels, None, [], largest, logsum, *grads, **options, needed=[True, True, False]
    )
    assert kernels.num_entries == chunk * classes
