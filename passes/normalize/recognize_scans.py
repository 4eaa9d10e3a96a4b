"""Read a product with a matrix of decays as the recurrence that it is.

Before, states of chunks are summed, each as far as it has decayed since::

    %decay = aten.exp(...)    # of sums over parts of %a: exp(a[j + 1] + .. + a[i]) for j <= i, else 0
    %y = aten.einsum('bzch,bzhpn->bchpn', [%decay, %x])

after, ``sptransform.scan`` computes ``y[i] = exp(a[i]) * y[i - 1] + x[i]``, of which ranks can have blocks::

    %y = sptransform.scan(%x, %a, 1)

1. The decays are recognised by their values (``masks/decays.py``), whatever ops made them.
2. The matrix has the summed dimension, one dimension of its own, and others that both operands and the result have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow, notes
from sptransform.graph.calls import op_call
from sptransform.graph.edit import emit_like, succeed
from sptransform.masks.decays import decays_of

aten, sp = torch.ops.aten, torch.ops.sptransform


@dataclass(frozen=True)
class RecognizeScans(Pass):
    requires = frozenset({"functional"})
    ensures = frozenset({"functional"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        for node in list(graph.nodes):
            if node.target is aten.einsum.default and len(dataflow.operands(node)) == 2:
                _recognize(node)
        graph.eliminate_dead_code()


def _recognize(node: fx.Node) -> None:
    left, _, result = op_call(node).argument("equation").replace(" ", "").partition("->")
    names, operands = left.split(","), dataflow.operands(node)
    for at in (0, 1):
        new = _scan(node, operands[at], names[at], operands[1 - at], names[1 - at], result)
        if new is not None:
            succeed(node, new)
            return


def _scan(node: fx.Node, matrix: fx.Node, of_matrix: str, x: fx.Node, of_x: str, result: str) -> fx.Node | None:
    """The scan that ``node`` is if ``matrix`` has decays; None if it is none."""
    summed = set(of_matrix) & set(of_x) - set(result)
    own = set(of_matrix) - set(of_x)
    if len(summed) != 1 or len(own) != 1 or "." in of_matrix + of_x or set(result) != set(of_x) - summed | own:
        return None
    (source,), (target,) = summed, own
    if len({*of_matrix}) != len(of_matrix) or len({*of_x}) != len(of_x):
        return None
    found = decays_of(matrix, row=of_matrix.index(target), column=of_matrix.index(source))
    if found is None or not notes.passes_gradients(matrix):
        return None
    log_decay, dims = found
    # from the matrix' dimensions to those of the result, in which the summed one has the place of the own one
    read = [of_matrix[d] for d in dims]
    shared = [name for name in result if name in read]
    order = [read.index(name) for name in shared]
    log_decay = emit_like(node, aten.permute.default, log_decay, order)
    for dim, name in enumerate(result):
        if name not in shared:
            log_decay = emit_like(node, aten.unsqueeze.default, log_decay, dim)
    x = emit_like(node, aten.permute.default, x, [of_x.index(source if name == target else name) for name in result])
    new = emit_like(node, sp.scan.default, x, log_decay, result.index(target))
    return new if dataflow.value(new).dtype == dataflow.value(node).dtype else None
