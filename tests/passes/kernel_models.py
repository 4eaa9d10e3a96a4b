"""A model of one attention by a kernel, on one device and on all ranks, for the tests of what reads kernels."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.support.equality import Result, assert_equal_to_one_device, run_one_device
from tests.support.models import FLOAT64
from tests.support.rewritten import Asked, on_pretended_ranks

BATCH, LENGTH, OTHER_LENGTH, HEADS, KEY_HEADS, WIDTH = 2, 12, 18, 4, 2, 3
HIDDEN = HEADS * WIDTH
Attend = Callable[..., Tensor]


class Model(nn.Module):
    """One attention by a kernel, and a loss: queries of ``x``, keys of ``y``, in the layout of the kernels."""

    def __init__(self, attend: Attend, is_packed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend, self.is_packed = attend, is_packed
        self.query = nn.Linear(HIDDEN, HIDDEN)
        self.key, self.value = (nn.Linear(HIDDEN, KEY_HEADS * WIDTH) for _ in range(2))
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.double()

    def forward(self, x: Tensor, y: Tensor | None = None, **ends: Tensor) -> Tensor:
        y = x if y is None else y
        q, k, v = (f(z).unflatten(-1, (-1, WIDTH)) for f, z in ((self.query, x), (self.key, y), (self.value, y)))
        if self.is_packed:
            q, k, v = q[0], k[0], v[0]
        out = self.attend(q, k, v, **ends)
        return (x + self.out(out.reshape(x.shape))).square().sum(-1).sin().mean()


def tokens(length: int = LENGTH, batch: int = BATCH, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, HIDDEN, dtype=torch.float64, generator=generator)


STRATEGIES = [Asked(2, "ulysses"), Asked(3, "ring"), Asked(2, "allgather"), Asked(2, "megatron"), Asked((2, 2), "usp")]


def assert_exact(model: nn.Module, inputs: dict[str, Tensor], reference: Result | None = None) -> None:
    reference = run_one_device(model, inputs) if reference is None else reference
    for asked, ranks in on_pretended_ranks(model, inputs, STRATEGIES).items():
        assert ranks.context.result.fallbacks == [], asked
        for result in ranks.results():
            assert_equal_to_one_device(reference, result, FLOAT64)


def without_lines(message: str) -> str:
    """The message without where torch and this checkout are, and without what torch's interpreter adds to it."""
    message = message.split("\n\nWhile executing")[0]
    return re.sub(r"  in: .*?/((?:tests|torch)/\S+?):\d+:", r"  in: \1:", message)
