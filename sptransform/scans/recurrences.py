"""Finds a linear recurrence behind a tree of products: ``y[i] = a[i] * y[i - 1] + x[i]``.

An associative scan combines rows pair by pair, then pairs of pairs, and interleaves what comes back. The region between
the rows and the result is products and sums of slices, see :mod:`sptransform.scans.analytic`.
"""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor, fx

from sptransform.graph import dataflow
from sptransform.scans.analytic import NotAnalyticError, Region

aten = torch.ops.aten

# what a tree is made of
_TREE = {
    aten.add.Tensor,
    aten.cat.default,
    aten.constant_pad_nd.default,
    aten.flatten.using_ints,
    aten.mul.Tensor,
    aten.pad.default,
    aten.slice.Tensor,
    aten.stack.default,
}


def recurrence_of(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The factors ``a`` and the summands ``x`` of the recurrence along dim 0 whose rows ``node`` has, else None."""
    if not _interleaves(node):
        return None
    rows = _rows(node)
    if len(rows) != 2:
        return None
    return next((pair for pair in permutations(rows) if _is_recurrence(node, *pair)), None)


def _interleaves(node: fx.Node) -> bool:
    """Whether ``node`` is rows of two tensors in turns."""
    if node.target is aten.slice.Tensor:
        node = dataflow.operands(node)[0]
    return node.target is aten.flatten.using_ints and dataflow.operands(node)[0].target is aten.stack.default


def _rows(node: fx.Node) -> list[fx.Node]:
    """Tensors of the shape of ``node`` that the tree takes every other row of."""
    found: list[fx.Node] = []
    seen, stack = {node}, [node]
    while stack:
        at = stack.pop()
        if at is not node and dataflow.shape(at) == dataflow.shape(node) and any(map(_is_strided, at.users)):
            found.append(at)
        elif at.target in _TREE:
            new = [x for x in dataflow.operands(at) if x not in seen]
            seen.update(new)
            stack.extend(new)
    return found


def _is_strided(node: fx.Node) -> bool:
    return node.target is aten.slice.Tensor and len(node.args) > 4 and node.args[1] == 0 and node.args[4] == 2


def _is_recurrence(node: fx.Node, a: fx.Node, x: fx.Node) -> bool:
    shape = dataflow.shape(node)
    if not isinstance(shape[0], int):
        return False
    generator = torch.Generator().manual_seed(0)
    # other dimensions have sizes that differ, so that none is moved or turned unseen; no product of factors vanishes
    sizes = [2, shape[0], *range(2, len(shape) + 1)]
    logarithms, summands = torch.rand(sizes, generator=generator, dtype=torch.float64)
    factors = (logarithms - 0.5).exp()
    try:
        with torch.no_grad():
            found = Region({a: factors, x: summands}).value(node)
    except (RuntimeError, NotAnalyticError):
        return False
    return found.shape == summands.shape and torch.allclose(found, _computed(factors, summands), rtol=1e-9, atol=0)


def _computed(factors: Tensor, summands: Tensor) -> Tensor:
    rows = [summands[0]]
    for a, x in zip(factors[1:], summands[1:], strict=True):
        rows.append(a * rows[-1] + x)
    return torch.stack(rows)
