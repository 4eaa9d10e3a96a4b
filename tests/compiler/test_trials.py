"""Trials of strategies: one captured graph, of which each rewrites a copy."""

from __future__ import annotations

from typing import Any

import pytest
from torch import fx

import sptransform
from sptransform.compiler import trials as module
from sptransform.compiler.fake_models import without_meta
from sptransform.compiler.options import Options
from sptransform.compiler.rewrite import rewritten_for, while_captured
from sptransform.compiler.trials import trials
from sptransform.sharding.mesh import Mesh
from sptransform.strategies.ring import Ring
from sptransform.strategies.ulysses import Ulysses
from tests.support.layers import meta_layer

SIZES = {"width": 64, "heads": 8, "key_heads": 4, "dim": 64, "hidden": 128}


def test_a_trial_leaves_the_captured_graph_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = without_meta(*meta_layer(1, 64, SIZES))
    captured = []

    def capture(*args: Any) -> fx.GraphModule:
        captured.append(args)
        return own(*args)

    own = module.capture
    monkeypatch.setattr(module, "capture", capture)

    def use(gm: fx.GraphModule, given: list[Any]) -> list[str]:
        trial = trials(rewritten_for, gm, given, Options(outputs="dtensor"), Mesh.pretended(4))
        return [str(trial(strategy, (4,), 1)) for strategy in (Ring(), Ulysses(), Ring(), Ulysses())]

    ring, ulysses, *again = while_captured(model, use, *inputs)
    assert len(captured) == 1
    assert again == [ring, ulysses] and ring != ulysses
    model, inputs = meta_layer(1, 64, SIZES)
    assert ring == str(sptransform.rewrite(model, "ring", inputs, world_size=4, rank=1))
    assert ulysses == str(sptransform.rewrite(model, "ulysses", inputs, world_size=4, rank=1))
