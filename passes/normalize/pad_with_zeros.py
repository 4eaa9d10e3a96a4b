"""Pad a tensor where zeros are joined to it.

Before, states are shifted by one, and no rank could join its own::

    %states2 = aten.cat([%zeros, %states], 1)

after, they keep their axis::

    %states2 = aten.constant_pad_nd(%states, [0, 0, 1, 0])

1. Zeros in front and zeros behind, however many tensors of them. One tensor has other entries, of the result's dtype.
2. An axis of one entry stays: padded, it would be no axis that ranks can share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow
from sptransform.graph.calls import op_call
from sptransform.graph.edit import emit_like, succeed

aten = torch.ops.aten

_ZEROS = {aten.new_zeros.default, aten.zeros.default, aten.zeros_like.default}


@dataclass(frozen=True)
class PadWithZeros(Pass):
    requires = frozenset({"functional"})
    ensures = frozenset({"functional"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        for node in list(graph.nodes):
            if node.target in (aten.cat.default, aten.concatenate.default):
                _pad(node)
        graph.eliminate_dead_code()


def _pad(node: fx.Node) -> None:
    pieces = dataflow.operands(node)
    others = [at for at, piece in enumerate(pieces) if piece.target not in _ZEROS]
    if len(others) != 1 or len(pieces) == 1:
        return
    at, ndim = others[0], len(dataflow.shape(node))
    if any(len(dataflow.shape(piece)) != ndim for piece in pieces):
        return
    dim = op_call(node).argument("dim") % ndim
    sizes = [dataflow.shape(piece)[dim] for piece in pieces]
    is_known = all(isinstance(size, int) for size in sizes)
    if not is_known or sizes[at] < 2 or dataflow.value(pieces[at]).dtype != dataflow.value(node).dtype:
        return
    amounts = [*[0, 0] * (ndim - 1 - dim), sum(sizes[:at]), sum(sizes[at + 1 :])]
    succeed(node, emit_like(node, aten.constant_pad_nd.default, pieces[at], amounts))
