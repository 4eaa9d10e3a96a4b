"""Numbers that tell whether ranks hold the same tensor, read without waiting for a GPU.

Integers, and whatever is compared bit by bit, become one sum of 64-bit words times odd weights, modulo 2**64: a changed
word changes it, and so does another order. Floating point inputs may differ by rounding, for what makes them may not be
deterministic; of these a few entries are taken as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor, nn

NUM_SAMPLES = 64  # entries of a floating point input
_WHOLE = 2**20  # integer inputs of up to so many entries are read whole, of longer ones _SOME
_SOME = 2**16
_ROW = 2**12


@dataclass(frozen=True)
class Reading:
    """Numbers on their way to the host: ``exact`` [n] int64, ``sampled`` [m, NUM_SAMPLES] float64.

    ``ready`` is None where they are there already.
    """

    exact: Tensor
    sampled: Tensor
    ready: torch.Event | None

    @staticmethod
    def of(exact: Sequence[Tensor], sampled: Sequence[Tensor]) -> Reading:
        """Start copying the numbers, which are on the host and on one other device."""
        cpu = torch.device("cpu")
        device = next((x.device for x in (*exact, *sampled) if x.device != cpu), cpu)
        one, many = torch.empty(0, dtype=torch.int64), torch.empty(0, NUM_SAMPLES, dtype=torch.float64)
        if exact:
            one = torch.stack([x.to(device) for x in exact])
        if sampled:
            many = torch.stack([x.to(device) for x in sampled])
        if device == cpu:
            return Reading(one, many, None)
        one, many = one.to("cpu", non_blocking=True), many.to("cpu", non_blocking=True)
        ready = torch.Event(device)
        ready.record()
        return Reading(one, many, ready)

    def wait(self) -> tuple[list[int], list[list[float]]]:
        """The numbers."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.exact.tolist(), self.sampled.tolist()


@torch.no_grad()
def checksum(x: Tensor, whole: bool = True) -> Tensor:
    """A number of ``x``'s bits, a scalar int64 on its device; unless ``whole``, of a part of a long tensor."""
    if not whole and x.numel() > _WHOLE:
        x = _entries(x, _SOME)
    x = x.detach().resolve_conj().resolve_neg()
    words = x.reshape(-1) if x.dtype == torch.int64 else _words(x)
    if words.numel() <= _ROW:
        return _weighed(words)
    # sums of rows and of columns see each place, and convert nothing
    num_rows = words.numel() // _ROW
    rows, rest = words[: num_rows * _ROW].view(num_rows, _ROW), words[num_rows * _ROW :]
    return _weighed(rows.sum(0)) + 3 * _weighed(rows.sum(1)) + 5 * _weighed(rest)


def _words(x: Tensor) -> Tensor:
    """The bits of ``x`` as int64, the last of them filled up with zeros."""
    flat = torch.view_as_real(x).reshape(-1) if x.is_complex() else x.reshape(-1)
    data = flat.view(torch.uint8)
    if missing := -data.numel() % 8:
        data = nn.functional.pad(data, (0, missing))
    return data.view(torch.int64)


def _weighed(words: Tensor) -> Tensor:
    return (words * _weights(words.numel(), words.device)).sum()


@torch.no_grad()
def sample(x: Tensor) -> Tensor:
    """Entries of ``x`` at even distances, [NUM_SAMPLES] float64; the last ones repeat if it has fewer."""
    if x.numel() == 0:
        return torch.zeros(NUM_SAMPLES, dtype=torch.float64, device=x.device)
    entries = _entries(x.detach(), NUM_SAMPLES)
    return (entries.abs() if entries.is_complex() else entries).to(torch.float64)


def _entries(x: Tensor, count: int) -> Tensor:
    return x[_places(tuple(x.shape), count, x.device)] if x.ndim else x.expand(count)


@lru_cache(maxsize=64)
def _places(shape: tuple[int, ...], count: int, device: torch.device) -> tuple[Tensor, ...]:
    """The index of ``count`` entries, one tensor a dimension; reading them copies nothing else."""
    size = prod(shape)
    return torch.unravel_index(torch.arange(count, device=device) * size // count, shape)


@lru_cache(maxsize=16)
def _weights(count: int, device: torch.device) -> Tensor:
    """Odd numbers that look random (SplitMix64; Steele, Lea and Flood, OOPSLA 2014, §4)."""
    x = torch.arange(1, count + 1, device=device) * -7046029254386353131
    x = (x ^ (x >> 30)) * -4658895280553007687
    return (x ^ (x >> 27)) * -7723592293110705685 | 1
