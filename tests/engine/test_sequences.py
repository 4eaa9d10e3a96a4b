"""Which evidence of a sequence counts where there is stronger, and what no evidence is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from sptransform import UsageError, explain
from tests.support.rewritten import Asked, on_pretended_ranks
from tests.support.tiers import tiered

Program = Callable[[torch.Tensor], torch.Tensor]


class Of(nn.Module):
    def __init__(self, program: Program, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.program = program

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.program(self.parts, x)


TABLE, IMAGE, SIGNAL, LINEAR = nn.Embedding(9, 6), nn.Conv2d(2, 2, 3, padding=1), nn.Conv1d(6, 6, 3), nn.Linear(6, 6)
PATCHES, RAISED = nn.Conv2d(2, 2, 2, 2), nn.Conv2d(2, 2, 1, padding=1)
TOKENS, ROWS = torch.arange(8).view(2, 4), torch.randn(2, 2, 6, 6)

# what is cut, by the stronger kind where there are two: 4 tokens, 6 rows of an image, 6 steps of a signal
CASES = {
    "tokens": (Of(lambda parts, x: parts[1](parts[0](x)), TABLE, LINEAR), TOKENS, (2, 2, 6)),
    "rows": (Of(lambda parts, x: parts[0](x), IMAGE), ROWS, (2, 2, 3, 6)),
    "patches": (Of(lambda parts, x: parts[0](x), PATCHES), ROWS[:, :, :4], (2, 2, 1, 3)),
    "one row": (Of(lambda parts, x: parts[0](x), IMAGE), ROWS[:, :, :1], (2, 2, 1, 3)),
    "one row that becomes three": (Of(lambda parts, x: parts[0](x), RAISED), ROWS[:, :, :1], (2, 2, 3, 4)),
    "a signal of rows": (
        Of(lambda parts, x: parts[1](parts[0](x).sum(1).transpose(1, 2)).sum(1), IMAGE, SIGNAL), ROWS, (2, 2)
    ),
    "rows before tokens": (
        Of(lambda parts, x: parts[1](parts[0](x)[:, None].expand(-1, 2, -1, -1)), TABLE, IMAGE), TOKENS, (2, 2, 2, 6)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", tiered(CASES, quick=["rows before tokens"]))
def test_what_is_cut(name: str) -> None:
    model, x, shape = CASES[name]
    asked = Asked(2, "ulysses")
    ranks = on_pretended_ranks(model, {"x": x}, [asked])[asked]
    (output,) = ranks.graphs[0].graph_module.graph.output_node().args
    found = output[0]
    while "all_gather" in str(found.target):
        (found,) = found.all_input_nodes
    assert tuple(found.meta["val"].shape) == shape


@pytest.mark.slow
def test_a_linear_alone_says_nothing() -> None:
    with pytest.raises(UsageError, match="which dimension is the sequence"):
        explain(Of(lambda parts, x: parts[0](x), LINEAR), "ulysses", {"x": torch.randn(2, 4, 6)}, world_size=2)
