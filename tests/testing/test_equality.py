"""How far two results are apart."""

from __future__ import annotations

import torch

from sptransform.testing.equality import Result, worst_error


def test_a_parameter_without_entries_is_no_difference() -> None:
    """As of a small model whose inner width comes to nothing."""
    reference = Result(torch.tensor(2.0), {"empty": torch.empty(0, 3), "full": torch.tensor([4.0, 1.0])})
    got = Result(torch.tensor(2.0), {"empty": torch.empty(0, 3), "full": torch.tensor([4.0, 1.5])})
    assert worst_error(reference, got) == ("full", 0.125)
    assert worst_error(Result(reference.loss, {"empty": torch.empty(0, 3)}), reference)[1] == 0.0
