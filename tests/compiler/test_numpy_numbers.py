"""What numpy functions make of sizes are sizes; of arrays they still make arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sptransform.capture.capture import capture
from tests.support.graphs import compiled_with


def flattened(x: Tensor) -> Tensor:
    count = np.prod(x.shape[1:])
    return x.reshape(x.shape[0], count) * np.sqrt(count).item() + np.maximum(2, 3)


def of_an_array(x: Tensor) -> Tensor:
    return x * torch.from_numpy(np.cumsum(np.ones(4)))


def drawn(x: Tensor) -> Tensor:
    return x * np.random.randint(2, 3)


def test_a_drawn_number_is_no_size() -> None:
    """The graph would draw it once, and one device draws it at every call."""
    with pytest.raises(Exception, match=r"random|RandomState"):
        compiled_with(drawn, capture, torch.ones(2))


def test_a_size_that_numpy_computes() -> None:
    x = torch.arange(24.0, dtype=torch.float64).reshape(2, 3, 4)
    for program in (flattened, of_an_array):
        assert torch.equal(compiled_with(program, capture, x), program(x))
