"""A function with an ``assert``, which pytest would rewrite in a file of tests."""

from __future__ import annotations

from torch import Tensor


def asserts(x: Tensor) -> Tensor:
    assert x.shape[0] != 2, "too short"
    return x
