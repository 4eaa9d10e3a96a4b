"""Time of what one rank computes in a ring, beside its share of one call over all keys.

The steps of `ring_attention` and of its backward run with nobody to talk to: a message that should come is what
was sent. So blocks, merges and copies are timed, and no wire. One call is the flash attention of torch over the whole
sequence, forward and backward; a rank's share is 1/N of its time. A ratio of 1 would be a ring that costs nothing
beside its kernels. Both are run in turns; a time is the median of several.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sptransform.ops.communication.steps import Start, drive
from sptransform.ops.ring.schedule import backward_steps, forward_steps
from sptransform.sharding.partition import Partition

ROUNDS = 5
SETTINGS = {
    "cuda": {"lengths": (16384, 65536), "ranks": (4, 8), "heads": (32, 8), "dim": 128, "dtype": torch.bfloat16},
    "cpu": {"lengths": (1024,), "ranks": (4,), "heads": (4, 2), "dim": 32, "dtype": torch.float32},
}


def ring_blocks(device: str) -> Iterator[dict[str, Any]]:
    """Of each length, number of ranks and direction: milliseconds of a rank and of one call, and their ratio."""
    setting = SETTINGS[device]
    heads, key_heads = setting["heads"]
    for length in setting["lengths"]:
        xs = [
            torch.randn(1, n, length, setting["dim"], device=device, dtype=setting["dtype"])
            for n in (heads, heads, key_heads, key_heads)
        ]
        for ranks in setting["ranks"]:
            rank = Rank(xs, ranks, device)
            pairs = {"forward": (rank.forward, rank.whole), "backward": (rank.backward, rank.whole_backward)}
            for direction, (own, whole) in pairs.items():
                times = _in_turns(own, whole, device)
                yield {
                    "length": length,
                    "ranks": ranks,
                    "direction": direction,
                    "ms of a rank": times[0],
                    "ms of one call": times[1],
                    "ratio to its share": times[0] * ranks / times[1],
                }


class Rank:
    """Rank 0 of a zigzag ring over causal attention of grad, query, key, value [1, H, s, D]."""

    def __init__(self, xs: list[Tensor], ranks: int, device: str) -> None:
        self.xs, self.device = xs, device
        length = xs[0].shape[2]
        partition = Partition.zigzag(length, ranks)
        mine = torch.cat([torch.arange(start, stop) for start, stop in partition.owned[0]]).to(device)
        self.grad, self.query, self.key, self.value = (x.index_select(2, mine) for x in xs)
        self.options = {"nearest": 0, "queries": str(partition), "keys": str(partition)}
        self.out, self.lse, self.seed = self.forward()
        self.leaves = [x.detach().requires_grad_() for x in xs[1:]]
        self.result = self.whole()

    def forward(self) -> Any:
        return self._run(forward_steps(0, self.query, self.key, self.value, [], [], **self.options))

    def backward(self) -> Any:
        given = self.grad, self.query, self.key, self.value, [], [], self.out, self.lse, self.seed
        return self._run(backward_steps(0, *given, **self.options))

    def whole(self) -> Tensor:
        return scaled_dot_product_attention(*self.leaves, is_causal=True, enable_gqa=True)

    def whole_backward(self) -> Any:
        return torch.autograd.grad(self.result, self.leaves, self.xs[0], retain_graph=True)

    def _run(self, steps: Any) -> Any:
        def start(asked: Start) -> Tensor:
            return asked.x if sum(asked.received) == asked.x.numel() else asked.x.new_zeros(sum(asked.received))

        with torch.no_grad():
            return drive(steps, start, lambda came: came)


def _in_turns(one: Callable[[], Any], other: Callable[[], Any], device: str) -> tuple[float, float]:
    """Median milliseconds of both."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(ROUNDS + 2):
        for call, found in zip((one, other), times, strict=True):
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            if turn >= 2:  # before, kernels are compiled
                found.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[0]), statistics.median(times[1])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
