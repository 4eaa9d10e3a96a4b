"""What is the same in every layer is said once a compile."""

import logging

import pytest

import sptransform
from tests.support.shapes import build_shape


def test_ranks_without_heads_are_named_once_a_compile(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = build_shape(2, 2, 1, 64, False, num_layers=3)
    with caplog.at_level(logging.WARNING, logger="sptransform"):
        for _ in range(2):
            sptransform.rewrite(model, "ulysses", inputs, world_size=4)
    said = [record.getMessage() for record in caplog.records]
    assert said.count("2 of 4 ranks have no heads in attention") == 2
