"""Drop what a concatenation joins from empty tensors.

A cache that starts empty reads ``%k2 = aten.cat([%empty, %k], -2)``; afterwards users of ``%k2`` read ``%k``.

1. Pieces with no entries go, if another piece is left.
2. A concatenation of one piece, of the same dtype and shape as the result, is that piece.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from sptransform import annotations
from sptransform.pass_manager import Context, Pass


@dataclass(frozen=True)
class DropEmptyPieces(Pass):
    requires = frozenset({"functional"})
    ensures = frozenset({"functional"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        for node in list(graph.nodes):
            if node.target is not torch.ops.aten.cat.default:
                continue
            pieces = node.args[0]
            kept = [piece for piece in pieces if 0 not in annotations.shape(piece)]
            if not kept or len(kept) == len(pieces):
                continue
            whole = annotations.value(node)
            if len(kept) == 1 and annotations.value(kept[0]).dtype == whole.dtype:
                node.replace_all_uses_with(kept[0])
                graph.erase_node(node)
            else:
                node.args = (kept, *node.args[1:])
        graph.eliminate_dead_code()
