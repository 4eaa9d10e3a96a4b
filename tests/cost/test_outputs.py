"""What a model returns is held to the end of a step, and so are, for a while, the gradients of all of it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

import sptransform
from sptransform.cost.read import step_of
from tests.support.models import VOCAB
from tests.support.tiny import Attention, token_inputs


class LossAndLogits(Attention):
    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = super().forward(tokens)
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


def test_nothing_is_freed_that_was_not_made() -> None:
    """The loss's gradient is given, and of the logits, from which nothing else is computed, autograd makes zeros."""
    model: nn.Module = LossAndLogits().double()
    inputs = token_inputs()
    step = step_of(sptransform.rewrite(model, "ulysses", inputs, world_size=2), fuse=False)
    logits, loss = inputs["tokens"].numel() // 2 * VOCAB * 8, 8
    left = sum(work.allocated - work.freed for work in step.works)
    assert left == step.gradients + logits + loss
    zeros = [work.allocated for work in step.works if work.op == "aten.zeros"]
    assert sorted(zeros) == [loss, logits]
