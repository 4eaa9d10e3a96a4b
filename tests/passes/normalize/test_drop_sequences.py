"""``outputs="loss"``: only what has no sequence is returned, and nothing else is computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sptransform import MegatronSP, Ulysses
from sptransform.diagnostics.errors import UsageError
from sptransform.passes.normalize.drop_sequences import DropSequences
from tests.passes.blocks import hidden_states
from tests.support.graphs import a_context, after, assert_ranks_equal_one_device, nodes_of, on_ranks
from tests.support.heads import WithLoss, plain, some_labels
from tests.support.tiers import tiered

aten = torch.ops.aten


def everything(head: nn.Linear, x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """A loss; logits, what only is returned, tokens and batch in one dim; a mean over the sequence, a count."""
    logits = head(x)
    return plain(head, x, labels), logits.log_softmax(-1), x.cos(), x.flatten(0, 1), x.mean(1), (labels >= 0).sum()


@pytest.mark.parametrize("grad", tiered([True, False], quick=[True]))
def test_what_has_a_sequence_is_dropped(grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        inputs = hidden_states(), some_labels()
        gm, _ = after(DropSequences, WithLoss(everything), *inputs, context=a_context(outputs="loss"))
    (returned,) = gm.graph.output_node().args
    kinds = [None if x is None else tuple(x.meta["val"].shape) for x in returned]
    assert kinds == [(), None, None, None, (2, 8), ()]
    assert not nodes_of(gm, aten.cos.default) and not nodes_of(gm, aten.log_softmax.int)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [Ulysses(), Ulysses(split="batch"), MegatronSP()], ids=str)
def test_ranks_return_whole_tensors(strategy: Ulysses | MegatronSP) -> None:
    options = {"num_ranks": 2, "strategy": strategy, "outputs": "loss", "loss_chunk": 4}
    reference, ranks, _ = on_ranks(WithLoss(everything), hidden_states(), some_labels(), **options)
    for run in [reference, *ranks]:
        run.outputs[1:4] = []
    assert_ranks_equal_one_device(reference, ranks)


def test_a_call_without_a_loss_is_refused() -> None:
    model = WithLoss(lambda head, x, labels: head(x))
    with pytest.raises(UsageError, match=r"this call has none(.|\n)*pass labels"):
        after(DropSequences, model, hidden_states(), some_labels(), context=a_context(outputs="loss"))
