"""A cache that starts empty adds nothing; other concatenations stay."""

from __future__ import annotations

import torch

from sptransform.graph.printer import text
from sptransform.passes.normalize.drop_empty_pieces import DropEmptyPieces
from tests.support.golden import Golden
from tests.support.graphs import after, captured, nodes_of

PASS = (DropEmptyPieces(),)
CAT = torch.ops.aten.cat.default


def with_empty_cache(key: torch.Tensor) -> torch.Tensor:
    cache = key.new_empty(2, 4, 0, 2)
    return torch.cat([cache, key], dim=-2) * 2.0


def test_golden(golden: Golden) -> None:
    key = torch.randn(2, 4, 8, 2)
    before, _ = captured(with_empty_cache, key)
    done, _ = after(PASS, with_empty_cache, key)
    golden.check("drop_empty_pieces", before=text(before.graph.nodes), after=text(done.graph.nodes))
    assert torch.equal(done(key)[0], key * 2.0)


def test_old_style_empty_cache() -> None:
    """`torch.cat` also takes an empty tensor of another number of dims."""
    key = torch.randn(2, 4, 8, 2)
    gm, _ = after(PASS, lambda key: torch.cat([key.new_empty(0), key], dim=-2) * 2.0, key)
    assert not nodes_of(gm, CAT)
    assert torch.equal(gm(key)[0], key * 2.0)


def test_full_pieces_stay() -> None:
    x, y = torch.randn(2, 3), torch.randn(2, 4)
    gm, _ = after(PASS, lambda x, y: torch.cat([x, y], 1), x, y)
    assert len(nodes_of(gm, CAT)) == 1


def test_only_the_empty_piece_goes() -> None:
    x, y = torch.randn(2, 3), torch.randn(2, 4)
    gm, _ = after(PASS, lambda x, y: torch.cat([x, x[:, :0], y], 1), x, y)
    (node,) = nodes_of(gm, CAT)
    assert [piece.op for piece in node.args[0]] == ["placeholder", "placeholder"]
    assert torch.equal(gm(x, y)[0], torch.cat([x, y], 1))


def test_nothing_but_empty_pieces_stays() -> None:
    x = torch.randn(2, 0)
    gm, _ = after(PASS, lambda x: torch.cat([x, x], 1), x)
    assert len(nodes_of(gm, CAT)) == 1


def test_a_piece_of_another_dtype_is_converted_by_the_concatenation() -> None:
    x = torch.randn(2, 3)
    gm, _ = after(PASS, lambda x: torch.cat([x.new_empty(2, 0, dtype=torch.float64), x], 1), x)
    assert len(nodes_of(gm, CAT)) == 1
    assert gm(x)[0].dtype == torch.float64
