"""What Dynamo cannot do is refused by name."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch._dynamo.variables import TensorVariable

from sptransform import CaptureError
from tests.support.graphs import compiled_with


def doubled(x: torch.Tensor) -> torch.Tensor:
    return x.mul(2)


def test_a_failure_inside_of_dynamo_is_refused_at_the_users_line() -> None:
    with (
        mock.patch.object(TensorVariable, "call_method", side_effect=KeyError("lost")),
        pytest.raises(CaptureError, match=r"torch.compile failed (.|\n)*in: .*x\.mul\(2\)\n  found: KeyError: .*lost"),
    ):
        compiled_with(doubled, lambda gm, _: gm, torch.ones(2))
