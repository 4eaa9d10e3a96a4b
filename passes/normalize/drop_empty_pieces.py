"""Drop empty tensors from concatenations.

A cache that starts empty reads ``%k2 = aten.cat([%empty, %k], -2)``; afterwards users of ``%k2`` read ``%k``.

1. Pieces with no entries go, if another piece is left and the result keeps its dtype without them.
2. A concatenation of one piece is that piece.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import fx

from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow


@dataclass(frozen=True)
class DropEmptyPieces(Pass):
    requires = frozenset({"functional"})
    ensures = frozenset({"functional"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        for node in list(graph.nodes):
            if node.target is not torch.ops.aten.cat.default:
                continue
            pieces = node.args[0]
            kept = [piece for piece in pieces if 0 not in dataflow.shape(piece)]
            if not kept or len(kept) == len(pieces) or _dtype_of(kept) != dataflow.value(node).dtype:
                continue
            if len(kept) == 1:
                node.replace_all_uses_with(kept[0])
                graph.erase_node(node)
            else:
                node.args = (kept, *node.args[1:])
        graph.eliminate_dead_code()


def _dtype_of(pieces: list[fx.Node]) -> torch.dtype:
    """Dtype of a concatenation of ``pieces``."""
    return reduce(torch.promote_types, (dataflow.value(piece).dtype for piece in pieces))
