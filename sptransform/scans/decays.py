"""Finds the logarithms behind a matrix of decays: ``D[i, j] = exp(a[j + 1] + .. + a[i])`` for ``j <= i``, else 0.

Between ``a`` and the matrix are sums, exponentials and constant masks only, see :mod:`sptransform.scans.analytic`.
Batch dimensions are given sizes of their own, which tell where each of them ends up. The logarithms are of either sign,
so that no product of many decays is too small to be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import torch
from torch import fx

from sptransform.graph import dataflow
from sptransform.scans.analytic import ANALYTIC, CONVERSIONS, NotAnalyticError, Region

# a larger matrix is not computed here, and its decays are not found
_MAX_ENTRIES = 1 << 25


def decays_of(matrix: fx.Node, row: int, column: int) -> tuple[fx.Node, list[int]] | None:
    """The logarithms ``a``, and for each of its dimensions that of the matrix; the recurrence runs along ``row``.

    None if the matrix is no matrix of decays.
    """
    shape = dataflow.shape(matrix)
    size = shape[row]
    if size != shape[column] or not isinstance(size, int) or size < 2:
        return None
    for node in _candidates(matrix):
        own = dataflow.shape(node)
        for along in range(len(own)):
            if own[along] == size:
                dims = _places(matrix, row, column, node, along)
                if dims is not None:
                    return node, dims
    return None


def _candidates(matrix: fx.Node) -> Iterator[fx.Node]:
    """Nodes with one dimension less, from the matrix backwards."""
    ndim = len(dataflow.shape(matrix)) - 1
    seen, stack = {matrix}, [matrix]
    while stack:
        node = stack.pop(0)
        if len(dataflow.shape(node)) == ndim and dataflow.value(node).is_floating_point():
            yield node
        if node.target in ANALYTIC | CONVERSIONS:
            new = [x for x in dataflow.operands(node) if x not in seen]
            seen.update(new)
            stack.extend(new)


def _places(matrix: fx.Node, row: int, column: int, node: fx.Node, along: int) -> list[int] | None:
    """For each dimension of ``node`` that of the matrix, if the matrix has the decays of ``node`` along ``along``."""
    ndim, size = len(dataflow.shape(node)), dataflow.shape(node)[along]
    others = (n for n in count(2) if n != size)
    shape = [size if d == along else next(others) for d in range(ndim)]
    if size * torch.Size(shape).numel() > _MAX_ENTRIES:
        return None
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
    try:
        with torch.no_grad():
            found = Region({node: a}).value(matrix)
    except (RuntimeError, NotAnalyticError):
        return None
    dims = [row if d == along else _only(found.shape, shape[d]) for d in range(ndim)]
    if None in dims or len({*dims, column}) != found.ndim:
        return None
    own, all_dims = dataflow.shape(node), dataflow.shape(matrix)
    if any(own[d] != all_dims[dims[d]] for d in range(ndim)):
        return None  # a part of the batch, which the sizes here do not show
    total = a.cumsum(along).movedim(along, -1)
    expected = (total[..., :, None] - total[..., None, :]).exp().tril()
    batch = [d for i, d in enumerate(dims) if i != along]
    same = torch.allclose(found.permute([*batch, row, column]), expected, rtol=1e-9, atol=0)
    return dims if same else None


def _only(sizes: torch.Size, size: int) -> int | None:
    """The one dimension of this size; None if there is none, or several."""
    found = [d for d, other in enumerate(sizes) if other == size]
    return found[0] if len(found) == 1 else None
