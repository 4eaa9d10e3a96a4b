"""Whole tensors under masks, made where a node of a graph stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from sptransform.diagnostics.provenance import place
from sptransform.graph import dataflow
from sptransform.graph.edit import emit_like
from sptransform.sharding.sizes import Size

aten = torch.ops.aten


def ndim_of(node: fx.Node) -> int:
    return dataflow.value(node).ndim


def dtype_of(node: fx.Node) -> torch.dtype:
    return dataflow.value(node).dtype


class UnderMasks:
    """Adds nodes in front of ``at``. A mask is a node of booleans."""

    at: fx.Node

    def __init__(self) -> None:
        self._ordinals: dict[fx.Node, fx.Node] = {}
        self._checked: set[Any] = set()

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return emit_like(self.at, target, *args, **kwargs)

    def as_mask(self, x: fx.Node) -> fx.Node:
        return x if dtype_of(x) == torch.bool else self.emit(aten.ne.Scalar, x, 0)

    def count(self, mask: fx.Node) -> fx.Node:
        return self.emit(aten.sum.default, mask)

    def expanded(self, x: fx.Node, shape: Sequence[Size]) -> fx.Node:
        return x if dataflow.shape(x) == tuple(shape) else self.emit(aten.expand.default, x, list(shape))

    def where(self, mask: fx.Node, dim: int, x: fx.Node, other: Any) -> fx.Node:
        """``x`` under the mask, whose dimensions begin at ``dim``; elsewhere ``other``."""
        ndim = max(ndim_of(y) for y in (x, other) if isinstance(y, fx.Node))
        behind = ndim - dim - ndim_of(mask)
        condition = self.emit(aten.reshape.default, mask, [*dataflow.shape(mask), *[1] * behind]) if behind else mask
        if isinstance(other, fx.Node):
            return self.emit(aten.where.self, condition, x, other)
        return self.emit(aten.where.ScalarOther, condition, x, bool(other) if dtype_of(x) == torch.bool else other)

    def spread(self, x: fx.Node, dim: int, mask: fx.Node, fits: Any = aten.eq.Scalar) -> fx.Node:
        """``x``, with a row along ``dim`` for each true entry of the mask, with the mask's dimensions instead.

        One row for all is that row everywhere. It is an error when the graph runs if the number of true entries does
        not fit that of rows.
        """
        shape = dataflow.shape(x)
        if shape[dim] == 1 and fits is aten.eq.Scalar:
            ones: list[Size] = [1] * ndim_of(mask)
            return self.emit(aten.reshape.default, x, [*shape[:dim], *ones, *shape[dim + 1 :]])
        if mask not in self._ordinals:
            flat = self.emit(aten.reshape.default, mask, [-1])
            before = self.emit(aten.sub.Tensor, self.emit(aten.cumsum.default, flat, 0), 1)
            ordinals = self.emit(aten.clamp_min.default, before, 0)
            self._ordinals[mask] = self.emit(aten.reshape.default, ordinals, list(dataflow.shape(mask)))
        if (mask, shape[dim], fits) not in self._checked:
            self._checked.add((mask, shape[dim], fits))
            message = f"there are {shape[dim]} rows, and not as many true entries in the mask: {place(self.at)}"
            self.emit(aten._assert_async.msg, self.emit(fits, self.count(mask), shape[dim]), message)
        if shape[dim] == 0:  # a row for the places that have none
            x = self.emit(aten.constant_pad_nd.default, x, [*[0, 0] * (ndim_of(x) - dim - 1), 0, 1])
        return self.emit(aten.index.Tensor, x, [*[None] * dim, self._ordinals[mask]])
