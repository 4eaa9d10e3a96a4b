"""Masks of an open length: one graph is read once, and its attention is exact at other lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from sptransform.engine.pass_manager import run_passes
from sptransform.graph import dataflow
from sptransform.strategies.ring import Ring
from sptransform.strategies.ulysses import Ulysses
from tests.passes.masks import (
    BANDS,
    LEARNED,
    LENGTH,
    PASSES,
    PROGRAMS,
    RING,
    SDPA,
    WHOLE,
    attend,
    heads,
    of_size,
    open_graph,
)
from tests.support.graphs import a_context, nodes_of, run_once

# found at an open length, where it differs from what is found at a known one: bounds beyond the sequence are kept, and
# only sums and signs of whole numbers are formulas
ELSE: dict[str, tuple[tuple[int | None, int | None], bool]] = {
    "always within": ((0, 99), False),
    "floating point": ((None, None), True),
    "keys ahead only": ((None, None), True),  # clamped
    "nothing is visible": ((101, None), False),
}


def twice(x: Tensor) -> Tensor:
    """The input of twice the length."""
    for dim in range(x.dim()):
        if x.shape[dim] == LENGTH:
            x = torch.cat([x, x], dim)
    return x.detach().requires_grad_(x.requires_grad)


def assert_exact_at_other_lengths(gm: fx.GraphModule, mask: Any, inputs: list[Tensor]) -> None:
    for lengthened, length in ((inputs, LENGTH), ([*map(twice, inputs)], 2 * LENGTH)):
        # not fused: the backward of torch's CPU kernel is wrong for a row of scores that are all the lowest number
        with of_size(length), sdpa_kernel(SDPBackend.MATH):
            reference = run_once(lambda *x: attend(mask, *x).pow(2), lengthened)
        found = run_once(lambda *x, n=length: gm(n, *x)[0], lengthened)
        torch.testing.assert_close(found.outputs, reference.outputs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.grads, reference.grads, rtol=1e-12, atol=1e-12)


def read(mask: Any, *rest: Tensor, strategy: Any) -> tuple[fx.GraphModule, list[Tensor]]:
    torch.manual_seed(0)
    inputs = [heads(), heads(), heads(), *rest]
    gm = open_graph(lambda *x: attend(mask, *x).pow(2), inputs)
    assert not isinstance(dataflow.shape(nodes_of(gm, SDPA)[0])[2], int)  # still open
    return run_passes(gm, PASSES, a_context(strategy=strategy)), inputs


@pytest.mark.parametrize("name", [*BANDS, *PROGRAMS, *WHOLE])
def test_one_graph_serves_every_length(name: str) -> None:
    mask, *rest = {**BANDS, **PROGRAMS, **WHOLE}[name]
    inputs, band = (rest[0], rest[1]) if len(rest) > 1 else ([], rest[0])
    band, has_program = ELSE.get(name, (band, len(rest) > 1))
    gm, inputs = read(mask, *inputs, strategy=Ring())
    (node,) = nodes_of(gm, RING)
    assert (node.kwargs["nearest"], node.kwargs["farthest"]) == band
    assert bool(node.kwargs["mask"]) == has_program
    assert_exact_at_other_lengths(gm, mask, inputs)


@pytest.mark.parametrize(
    ("name", "is_causal"), [("key <= query", True), ("triu of -inf", True), ("all", False), ("counted tokens", True)]
)
def test_kernels_that_know_causal_masks_keep_them(name: str, is_causal: bool) -> None:
    """Where queries and keys are not cut."""
    mask, _ = BANDS[name]
    gm, inputs = read(mask, strategy=Ulysses())
    (node,) = nodes_of(gm, SDPA)
    assert node.args[3:] == (None, 0.0, is_causal) and not nodes_of(gm, RING)
    assert_exact_at_other_lengths(gm, mask, inputs)


@pytest.mark.parametrize("name", ["an input", "a bias and causal", "counted"])
def test_a_mask_that_is_no_program_stays(name: str) -> None:
    mask, rest, *_ = WHOLE[name]
    gm, inputs = read(mask, *rest, strategy=Ulysses())
    (node,) = nodes_of(gm, SDPA)
    assert node.args[3] is not None and not nodes_of(gm, RING)
    assert_exact_at_other_lengths(gm, mask, inputs)


@pytest.mark.parametrize("name", ["padding", "documents", "window", "bias by distance"])
def test_programs_where_queries_are_not_cut(name: str) -> None:
    mask, *rest = {**BANDS, **PROGRAMS}[name]
    gm, inputs = read(mask, *(rest[0] if len(rest) > 1 else []), strategy=Ulysses())
    assert nodes_of(gm, RING) and not nodes_of(gm, SDPA)
    assert_exact_at_other_lengths(gm, mask, inputs)


# torch's sizes of a tensor with length squared entries that is viewed are rounded quotients: such a model is captured
# for the length at hand
_OPEN = [name for name in LEARNED if "flat" not in name]


@pytest.mark.covering(ways=1)
@pytest.mark.parametrize("strategy", [Ring(), Ulysses()], ids=str)
@pytest.mark.parametrize("name", _OPEN)
def test_learned_masks(name: str, strategy: Any) -> None:
    mask, rest, band, counts, _ = LEARNED[name]
    gm, inputs = read(mask, *rest, strategy=strategy)
    (node,) = nodes_of(gm, RING)
    assert (node.kwargs.get("nearest"), node.kwargs.get("farthest")) == band
    tables = node.args[6] if len(node.args) > 6 else []
    assert (len(node.args[3]), len(node.args[4]), len(tables)) == counts
    assert_exact_at_other_lengths(gm, mask, inputs)
