"""Heads of language models, each with its loss, as people write them; and a model of one block around one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.passes.blocks import BATCH, HIDDEN, LENGTH, Attention

CLASSES = 13
Loss = Callable[[nn.Linear, Tensor, Tensor], Any]


def some_labels() -> Tensor:
    """For each token, some ignored."""
    torch.manual_seed(1)
    return torch.randint(CLASSES, (BATCH, LENGTH)).index_fill(1, torch.tensor([0, 5]), -100)


class WithLoss(nn.Module):
    """Attention, and what ``loss`` makes of its hidden states, the labels and a linear."""

    def __init__(self, loss: Loss, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.loss = Attention(), loss
        self.head = nn.Linear(HIDDEN, CLASSES, bias=bias, dtype=torch.float64)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        return self.loss(self.head, self.attention(x), labels)


def plain(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(head(x).view(-1, CLASSES), labels.view(-1))


def shifted(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    """As TRL: the last token has no label."""
    return functional.cross_entropy(head(x)[:, :-1].contiguous().flatten(0, 1), labels[:, 1:].flatten())


def padded(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    """As transformers: labels are moved, and their number is given."""
    moved = functional.pad(labels, (0, 1), value=-100)[..., 1:].contiguous().view(-1)
    total = functional.cross_entropy(head(x).double().view(-1, CLASSES), moved, ignore_index=-100, reduction="sum")
    return total / torch.tensor(7)


def classes_second(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(head(x).transpose(1, 2), labels)


def smoothed(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(head(x).flatten(0, 1), labels.flatten(), label_smoothing=0.1)


def weighted_tokens(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    losses = functional.cross_entropy(head(x).flatten(0, 1), labels.flatten(), reduction="none")
    return (losses * torch.linspace(0.1, 1.0, losses.shape[0], dtype=losses.dtype)).sum()


def weighted_classes(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    weight = torch.linspace(0.1, 1.0, CLASSES, dtype=x.dtype)
    return functional.cross_entropy(head(x).flatten(0, 1), labels.flatten(), weight)


def with_z_loss(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    logits = head(x)
    loss = functional.cross_entropy(logits.view(-1, CLASSES), labels.view(-1))
    return loss + 0.01 * logits.logsumexp(-1).square().mean()


def softcapped(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    """As Gemma-2."""
    logits = torch.tanh(head(x) / 0.5) * 0.5
    return functional.cross_entropy(logits.view(-1, CLASSES), labels.view(-1))


def masked_classes(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    """The last class only pads the vocabulary."""
    is_padding = torch.arange(CLASSES) >= CLASSES - 1
    logits = (head(x) * 0.3).masked_fill(is_padding, -torch.inf)
    return functional.cross_entropy(logits.view(-1, CLASSES), labels.view(-1).clamp(max=CLASSES - 2))


def fewer_classes(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    logits = head(x)[..., : CLASSES - 1]
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten().clamp(max=CLASSES - 2))


def looked_up(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    """As in reinforcement learning: the log-probability of each token, which is weighted."""
    logs = head(x)[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -(logs * (labels[:, 1:] != -100)).sum() / 5


def log_probabilities(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    return functional.nll_loss(head(x).flatten(0, 1).log_softmax(-1), labels.flatten())


def multiplied(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    """The product is not a linear's."""
    return functional.cross_entropy((x @ head.weight.t()).flatten(0, 1), labels.flatten(), reduction="sum")


def of_torch(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    return functional.linear_cross_entropy(
        x.flatten(0, 1), head.weight, labels.flatten(), linear_bias=head.bias, label_smoothing=0.1
    )


def of_torch_in_chunks(head: nn.Linear, x: Tensor, labels: Tensor, **options: Any) -> Tensor:
    chunks = nn.LinearCrossEntropyOptions(batch_chunk_size=5, chunking_method=None)
    return functional.linear_cross_entropy(
        x.flatten(0, 1), head.weight, labels.flatten(), linear_bias=head.bias, options=chunks, **options
    )


def of_torch_without_sum(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    weight = torch.linspace(0.1, 1.0, CLASSES, dtype=x.dtype)
    return of_torch_in_chunks(head, x, labels, reduction="none", weight=weight).square().mean()


def of_torch_with_weights(head: nn.Linear, x: Tensor, labels: Tensor) -> Tensor:
    return of_torch_in_chunks(head, x, labels, weight=torch.linspace(0.1, 1.0, CLASSES, dtype=x.dtype))


HEADS: dict[str, Loss] = {
    each.__name__: each
    for each in (
        plain,
        shifted,
        padded,
        classes_second,
        smoothed,
        weighted_tokens,
        weighted_classes,
        with_z_loss,
        softcapped,
        masked_classes,
        fewer_classes,
        looked_up,
        log_probabilities,
        multiplied,
        of_torch,
        of_torch_in_chunks,
        of_torch_without_sum,
        of_torch_with_weights,
    )
}
