"""Compute row by row, in the rows' own order, what a model computes in an order that data says.

A model that routes tokens to experts sorts them by expert, multiplies each group by its expert's matrix, and puts the
results back. Before::

    %keys, %order = aten.sort(%expert)
    %sorted       = aten.index(%x, [aten.floor_divide(%order, 2)])
    %ends         = aten.cumsum(aten.histc(%keys, 4, 0, 3), 0)
    %product      = transformers.grouped_mm_fallback(%sorted, %weight, %ends)
    %inverse      = aten.index_put(%empty, [%order], aten.arange(..))
    %out          = aten.index(aten.silu(%product), [%inverse])

after::

    %product = sptransform.grouped_product(%x, %weight, %expert, 2, transformers.grouped_mm_fallback)
    %out     = aten.silu(%product)

where every op has a rule for a part of the rows: no rank needs rows, numbers or counts of another. The op sorts for its
kernel inside. Which orders there are, and what is in them, see :mod:`sptransform.routing.orders`.

1. An order ends where its inverse is read, where its permutation is written, and in a sum over all that is in it.
2. Nothing is rewritten that does not lead there: it stays as it is, and so do other readers of what is.
3. A grouped product follows an order if its ends are counts of the order's keys, and these known to be numbers of its
   groups. Another stays, and with it all that is computed from it.
4. A row that is in several groups is multiplied from where it is, and not repeated before.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.routing.orders import DataOrders
from sptransform.routing.unsort import Unsorter


@dataclass(frozen=True)
class UndoSorting(Pass):
    requires = frozenset({"functional"})
    ensures = frozenset({"functional"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        unsorter = Unsorter(DataOrders(graph, context.rules), context.rules)
        for node in list(graph.nodes):
            if node.op == "call_function" and (left := unsorter.left(node)) is not None:
                node.replace_all_uses_with(left)
        graph.eliminate_dead_code()
