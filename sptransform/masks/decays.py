"""Finds the logarithms behind a matrix of decays: ``D[i, j] = exp(a[j + 1] + .. + a[i])`` for ``j <= i``, else 0.

Between ``a`` and the matrix are sums, exponentials and constant masks only, which are analytic functions of ``a``. Two of
them that agree at a random point are the same, but for a chance of zero. So the region is computed on random numbers, and
compared with the definition; how a model writes it does not matter. Batch dimensions are given sizes of their own, which
tell where each of them ends up.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx

from sptransform.graph import dataflow
from sptransform.rules.rule import map_nodes

aten = torch.ops.aten

# a larger matrix is not computed here, and its decays are not found
_MAX_ENTRIES = 1 << 25

_CONVERSIONS = {aten._to_copy.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout}

# in whatever varies; masks and other arguments are constants
_ANALYTIC = {
    aten.add.Scalar,
    aten.add.Tensor,
    aten.alias.default,
    aten.clone.default,
    aten.constant_pad_nd.default,
    aten.contiguous.default,
    aten.cumsum.default,
    aten.exp.default,
    aten.expand.default,
    aten.flip.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.mul.Scalar,
    aten.mul.Tensor,
    aten.neg.default,
    aten.pad.default,
    aten.permute.default,
    aten.rsub.Scalar,
    aten.slice.Tensor,
    aten.squeeze.dim,
    aten.sub.Scalar,
    aten.sub.Tensor,
    aten.transpose.int,
    aten.tril.default,
    aten.triu.default,
    aten.unsqueeze.default,
    aten.where.ScalarOther,
    aten.where.self,
}


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
        if node.target in _ANALYTIC | _CONVERSIONS:
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
    a = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.7
    try:
        with torch.no_grad():
            found = _Region(node, a).value(matrix)
    except (RuntimeError, _NotAnalyticError):
        return None
    dims = [row if d == along else _only(found.shape, shape[d]) for d in range(ndim)]
    if None in dims or len({*dims, column}) != found.ndim:
        return None
    total = a.cumsum(along).movedim(along, -1)
    expected = (total[..., :, None] - total[..., None, :]).exp().tril()
    batch = [d for i, d in enumerate(dims) if i != along]
    same = torch.allclose(found.permute([*batch, row, column]), expected, rtol=1e-9, atol=1e-12)
    return dims if same else None


def _only(sizes: torch.Size, size: int) -> int | None:
    """The one dimension of this size; None if there is none, or several."""
    found = [d for d, other in enumerate(sizes) if other == size]
    return found[0] if len(found) == 1 else None


class _NotAnalyticError(Exception):
    """The matrix depends on something else, or by other ops."""


class _Region:
    """Computes nodes from a value given for one of them; other inputs must be constants."""

    def __init__(self, node: fx.Node, value: Tensor) -> None:
        self._varying = {node: value}
        self._constant: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        if node in self._varying:
            return self._varying[node]
        if node not in self._constant:
            self._compute(node)
        return self._varying[node] if node in self._varying else self._constant[node]

    def _compute(self, node: fx.Node) -> None:
        if node.op != "call_function" or not dataflow.is_op(node.target) or dataflow.writes(node):
            raise _NotAnalyticError
        values = {x: self.value(x) for x in node.all_input_nodes}
        varying = [x for x in values if x in self._varying]
        if not varying:
            if torch.Tag.nondeterministic_seeded in node.target.tags:
                raise _NotAnalyticError
            self._constant[node] = self._run(node, values)
            return
        if node.target in _CONVERSIONS:
            self._varying[node] = values[varying[0]]
        elif node.target in _ANALYTIC:
            self._varying[node] = self._run(node, values)
        else:
            raise _NotAnalyticError

    def _run(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        def put(x: Any) -> Any:
            if isinstance(x, fx.Node):
                return values[x]
            return torch.device("cpu") if isinstance(x, torch.device) else x

        args, kwargs = map_nodes((node.args, dict(node.kwargs)), put)
        if node.target is aten.expand.default and node.args[0] in self._varying:
            args = (args[0], _grown(dataflow.shape(node.args[0]), args[1]))
        return node.target(*args, **kwargs)


def _grown(shape: tuple[Any, ...], sizes: list[int]) -> list[int]:
    """The sizes of an ``expand`` that only say which dimensions grow: the others may have any size."""
    new = len(sizes) - len(shape)
    return [*sizes[:new], *(-1 if size == own else size for size, own in zip(sizes[new:], shape, strict=True))]
