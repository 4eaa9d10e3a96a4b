"""A program that knows torch alone and names this package's backend: `python plain_program.py RANK STORE RESULT`.

`tests/frontend/test_api.py` starts it on two ranks.
"""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn


class Layer(nn.Module):
    """One attention; returns the sum of squares of what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(attended.transpose(1, 2).flatten(2)).square().sum()


def model_and_input() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Layer().double(), torch.randn(2, 8, 16, dtype=torch.float64)


def main(rank: int, store: str, result: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    model, x = model_and_input()
    assert not any(name.split(".")[0] == "sptransform" for name in sys.modules)
    compiled = torch.compile(model, backend="sptransform", options={"strategy": "ulysses", "backend": "aot_eager"})
    loss = compiled(x)
    loss.backward()
    assert "sptransform.compiler.backend" in sys.modules
    torch.save((loss.detach(), {name: p.grad for name, p in model.named_parameters()}), result)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
