"""Read a product with a matrix of decays, or a tree of products, as the recurrence that it is.

Before, states of chunks are summed, each as far as it has decayed since::

    %decay = aten.exp(...)    # of sums over parts of %a: exp(a[j + 1] + .. + a[i]) for j <= i, else 0
    %y = aten.einsum('bzch,bzhpn->bchpn', [%decay, %x])

after, ``sptransform.scan`` computes ``y[i] = exp(a[i]) * y[i - 1] + x[i]``, of which ranks can have blocks::

    %y = sptransform.scan(%x, %a, 1)

1. The decays are recognised by their values (``scans/decays.py``), whatever ops made them. The matrix has the summed
   dimension, one dimension of its own, and others that both operands and the result have.
2. An associative scan that was written out, as ``torch._higher_order_ops.associative_scan`` is, is recognised by its
   values too (``scans/recurrences.py``). What it multiplies by must be an exponential.
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
from sptransform.scans.decays import decays_of
from sptransform.scans.recurrences import recurrence_of

aten, sp = torch.ops.aten, torch.ops.sptransform

# from an exponential to the factors of a recurrence
_MOVES = {aten.movedim.int, aten.permute.default, aten.transpose.int}


@dataclass(frozen=True)
class RecognizeScans(Pass):
    requires = frozenset({"functional"})
    ensures = frozenset({"functional"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        for node in list(graph.nodes):
            if node.target is aten.einsum.default and len(dataflow.operands(node)) == 2:
                _read_product(node)
        graph.eliminate_dead_code()
        # the tree of all rows before those of every other row, which are gone with it
        for node in reversed(list(graph.nodes)):
            if node.users and _read_tree(node):
                graph.eliminate_dead_code()


def _read_product(node: fx.Node) -> None:
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
    order = [of_x.index(source if name == target else name) for name in result]
    if [dataflow.shape(x)[dim] for dim in order] != [*dataflow.shape(node)]:
        return None  # one row that many decays multiply
    found = decays_of(matrix, row=of_matrix.index(target), column=of_matrix.index(source))
    if found is None or not notes.passes_gradients(matrix):
        return None
    log_decay, dims = found
    # from the matrix' dimensions to those of the result, in which the summed one has the place of the own one
    read = [of_matrix[d] for d in dims]
    shared = [name for name in result if name in read]
    log_decay = emit_like(node, aten.permute.default, log_decay, [read.index(name) for name in shared])
    for dim, name in enumerate(result):
        if name not in shared:
            log_decay = emit_like(node, aten.unsqueeze.default, log_decay, dim)
    x = emit_like(node, aten.permute.default, x, order)
    new = emit_like(node, sp.scan.default, x, log_decay, result.index(target))
    return new if dataflow.value(new).dtype == dataflow.value(node).dtype else None


def _read_tree(node: fx.Node) -> bool:
    found = recurrence_of(node)
    if found is None or not notes.passes_gradients(node):
        return False
    factors, x = found
    moves = []
    while factors.target in _MOVES:
        moves.append(factors)
        factors = dataflow.operands(factors)[0]
    if factors.target is not aten.exp.default:
        return False
    (log_decay,) = dataflow.operands(factors)
    for move in reversed(moves):
        log_decay = emit_like(node, move.target, log_decay, *move.args[1:])
    new = emit_like(node, sp.scan.default, x, log_decay, 0)
    if dataflow.value(new).dtype != dataflow.value(node).dtype:
        return False
    succeed(node, new)
    return True
