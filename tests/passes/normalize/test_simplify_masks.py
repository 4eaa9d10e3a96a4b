"""What is known of a mask before it runs leaves the program of ring attention; the rest stays as it was written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from sptransform.engine.pass_manager import run_passes
from sptransform.passes.normalize.simplify_masks import SimplifyMasks
from tests.support.graphs import a_context, captured, nodes_of

sp = torch.ops.sptransform
EQUAL = "%2 = eq.Tensor(%0, %1)"
SIZE = 12


def attend(x: Tensor, rows: list[Tensor], columns: list[Tensor], **options: Any) -> Tensor:
    return sp.ring_attention(x, x, x, rows, columns, **options)[0]


def simplified(model: Any, *inputs: Tensor) -> fx.Node:
    """The attention that the pass leaves, which computes the same."""
    gm, inputs_of_graph = captured(model, *inputs)
    gm = run_passes(gm, (SimplifyMasks(),), a_context())
    (out,) = gm(*inputs_of_graph)
    torch.testing.assert_close(out, model(*inputs), rtol=0, atol=1e-12)
    (node,) = nodes_of(gm, sp.ring_attention.default)
    return node


def queries() -> Tensor:
    return torch.randn(2, 2, SIZE, 4, dtype=torch.float64)


def by_rows(x: Tensor) -> Tensor:
    return x[:, None, :, None]


def by_columns(x: Tensor) -> Tensor:
    return x[:, None, None, :]


def test_one_document_is_no_mask() -> None:
    def model(x: Tensor) -> Tensor:
        document = torch.zeros(1, SIZE)
        return attend(x, [by_rows(document)], [by_columns(document)], mask=EQUAL, nearest=0)

    node = simplified(model, queries())
    assert node.args[3:5] == ([], [])
    assert (node.kwargs["mask"], node.kwargs["nearest"], node.kwargs["farthest"]) == ("", 0, None)


def test_conditions_of_distance_become_bounds() -> None:
    def model(x: Tensor) -> Tensor:
        at = torch.arange(SIZE)[None]
        program = "%2 = sub.Tensor(%0, %1); %3 = le.Scalar(%2, 3); %4 = ge.Tensor(%0, %1); %5 = logical_and(%3, %4)"
        return attend(x, [by_rows(at)], [by_columns(at)], mask=program, farthest=7)

    node = simplified(model, queries())
    assert (node.kwargs["mask"], node.kwargs["nearest"], node.kwargs["farthest"]) == ("", 0, 3)


def test_padding_stays() -> None:
    def model(x: Tensor, visible: Tensor) -> Tensor:
        document = torch.zeros(2, SIZE)
        program = "%3 = eq.Tensor(%0, %1); %4 = logical_and(%2, %3)"
        return attend(x, [by_rows(document)], [by_columns(document), by_columns(visible)], mask=program, nearest=0)

    node = simplified(model, queries(), torch.arange(SIZE).expand(2, -1) >= 3)
    assert (node.kwargs["mask"], node.args[3], len(node.args[4])) == ("%0", [], 1)


def test_documents_of_an_input_stay() -> None:
    def model(x: Tensor, document: Tensor) -> Tensor:
        return attend(x, [by_rows(document)], [by_columns(document)], mask=EQUAL, nearest=0, scale=0.5)

    node = simplified(model, queries(), torch.arange(SIZE)[None] // 5)
    assert (node.kwargs["mask"], len(node.args[3]), len(node.args[4])) == (EQUAL, 1, 1)
    assert node.kwargs["scale"] == 0.5


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_other_arguments_stay(softcap: float) -> None:
    def model(x: Tensor, sinks: Tensor) -> Tensor:
        document = torch.zeros(1, SIZE)
        rows, columns = [by_rows(document)], [by_columns(document)]
        return sp.ring_attention(x, x, x, rows, columns, sinks, mask=EQUAL, nearest=0, softcap=softcap, scale=0.5)[0]

    node = simplified(model, queries(), torch.randn(2, dtype=torch.float64))
    assert node.args[5].op == "placeholder"
    assert (node.kwargs.get("softcap", 0.0), node.kwargs["scale"]) == (softcap, 0.5)
