"""While the backward is traced, graphs get no code; they run all the same."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import fx

from sptransform.cost.joint import without_code


def test_a_graph_without_code_is_interpreted() -> None:
    before = fx.symbolic_trace(lambda x: torch.neg(x))
    x = torch.ones(2)
    with without_code():
        made = fx.GraphModule(before, before.graph)
        assert torch.equal(made(x), -x) and torch.equal(before(x), -x)
        assert made.print_readable(print_output=False) == ""
    made.recompile()
    assert torch.equal(made(x), -x) and "neg" in made.code
    assert "forward" not in fx.GraphModule.__dict__


def test_other_threads_get_code_meanwhile() -> None:
    before = fx.GraphModule.recompile
    with without_code(), ThreadPoolExecutor(1) as threads:
        assert "neg" in threads.submit(lambda: fx.symbolic_trace(lambda x: torch.neg(x)).code).result(10)
    assert fx.GraphModule.recompile is before
