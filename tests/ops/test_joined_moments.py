"""Variances over what ranks share: a model's values and gradients, and what is sent."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sptransform.op_rules import DEFAULT_RULES
from sptransform.rules.rule import OpCall, Operand
from sptransform.rules.table import Sent
from sptransform.testing.pretended import forward_and_backward
from tests.support.equality import run_one_device, worst_error
from tests.support.rewritten import Asked, on_pretended_ranks

sp = torch.ops.sptransform


class Spread(nn.Module):
    """Every kind of variance, over a sequence that a convolution shows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # far from zero, where squares less the squared mean would have no digits left
        h = self.conv(x) + 1e5
        mean, var = torch.var_mean(h, (0, 2), correction=0, keepdim=True)[::-1]
        centred = (h - mean) / var.sqrt()
        constant = (h * 0).std(2)  # its gradient is zero, not nan
        return constant.sum() + (h.std(2) * h.var((0, 2), correction=2)).sum() + (centred**3).mean() + h.var()


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3, 6])
def test_equals_one_device(num_ranks: int) -> None:
    """Of 7 rows, with 6 ranks two have none."""
    torch.manual_seed(0)
    model, inputs, asked = Spread().double(), {"x": torch.randn(2, 3, 7).double()}, Asked(num_ranks, "ring")
    ranks = on_pretended_ranks(model, inputs, [asked])[asked]
    expected = run_one_device(model, inputs)
    assert not ranks.context.result.fallbacks
    # the shift costs 5 digits of float64 on one device too
    assert max(worst_error(expected, each)[1] for each in ranks.run(forward_and_backward)) < 1e-9


def test_what_is_sent() -> None:
    """Two all-reduces forward, none backward, of a number for each row, in the dtype of sums; 2 (N-1)/N of each."""
    for target in (sp.joined_std.default, sp.joined_var.default, sp.joined_var_mean.default):
        for dtype, num_bytes in ((torch.bfloat16, 4), (torch.float64, 8)):
            call = OpCall(target, (Operand(0), [1], True, 40, 1, 4, "group"), {}, ((2, 10, 3),), ((2, 1, 3),))
            sent = DEFAULT_RULES[target].sends(call, [torch.empty(2, 10, 3, dtype=dtype)], 0)
            assert sent == (Sent("all_reduce", 2, 2 * 2 * 6 * num_bytes * 3 // 4), Sent("all_reduce", 0, 0))
