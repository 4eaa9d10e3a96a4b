"""What depends on the version of torch."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn
from torch.fx.experimental import proxy_tensor

from sptransform import rewrite
from tests.support.tiers import tiered
from tests.support.tiny import SEQ_LEN, WIDTH


class WithPositions(nn.Module):
    """Adds to its input a tensor that it makes on the input's device."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(SEQ_LEN, WIDTH)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states = states + self.positions(torch.arange(SEQ_LEN, device=states.device))
        return nn.functional.scaled_dot_product_attention(*[states[:, None]] * 3).squeeze(1)


@pytest.mark.skipif(not hasattr(torch.compiler.config, "compile_on_one_rank"), reason="torch has it since 2.14")
@pytest.mark.parametrize("world_size", tiered([1, 2], quick=[2]))
def test_graphs_hold_devices_whatever_compile_on_one_rank_says(world_size: int) -> None:
    """On a GPU it puts a node in their place; here the CPU is taken for one."""
    inputs = {"states": torch.ones(2, SEQ_LEN, WIDTH)}
    expected = str(rewrite(WithPositions(), "ulysses", inputs, world_size=world_size))
    with (
        mock.patch.object(proxy_tensor, "_coor_match_current_accelerator", lambda tracer, device: True),
        mock.patch.object(proxy_tensor, "_coor_current_device", lambda: torch.device("cpu")),
        torch.compiler.config.patch(compile_on_one_rank=True),
    ):
        assert str(rewrite(WithPositions(), "ulysses", inputs, world_size=world_size)) == expected
