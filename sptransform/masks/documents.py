"""Documents packed into one sequence, given by where they end: which document a token is in, and where inside it.

Ends are cumulated lengths with a leading zero, ``[0, 3, 8]`` for documents of 3 and 5 tokens, as kernels take them.
Everything is computed in the graph from the ends, one number a token, and once for all layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sptransform.graph import dataflow
from sptransform.graph.edit import emit_like
from sptransform.op_rules.mask_ops import RETYPED
from sptransform.sharding.sizes import Size

aten = torch.ops.aten


def source_of(ends: fx.Node) -> fx.Node:
    """The node of which ``ends`` is a copy, or itself."""
    while ends.target in RETYPED and dataflow.value(ends).dtype == dataflow.value(dataflow.operands(ends)[0]).dtype:
        ends = dataflow.operands(ends)[0]
    return ends


@dataclass
class Documents:
    """Emits nodes for the documents of one graph; each stands before the attention that needs it first."""

    _made: dict[Any, fx.Node] = field(default_factory=dict)

    def positions(self, num_tokens: Size, like: fx.Node, before: fx.Node, offset: Size = 0) -> fx.Node:
        """``offset + [0, 1, ..]`` for every token, in the dtype of ``like`` if that is an integer, else int64."""
        value = dataflow.value(like)
        dtype = torch.int64 if value.is_floating_point() else value.dtype

        def make() -> fx.Node:
            stop = num_tokens + offset
            return emit_like(before, aten.arange.start, offset, stop, dtype=dtype, device=value.device)

        return self._once(("positions", num_tokens, offset, dtype, value.device), make)

    def of_keys(self, ends: fx.Node, num_tokens: Size, before: fx.Node) -> fx.Node:
        """For each token the number of ends up to it: 1 for the first document, one more than there are after all."""

        def make() -> fx.Node:
            positions = self.positions(num_tokens, ends, before)
            return emit_like(before, aten.searchsorted.Tensor, ends, positions, out_int32=True, right=True)

        return self._once(("keys", ends, num_tokens), make)

    def of_queries(self, ends: fx.Node, num_tokens: Size, before: fx.Node) -> fx.Node:
        """The same, but -1 for tokens of no document: these see nothing."""

        def make() -> fx.Node:
            document = self.of_keys(ends, num_tokens, before)
            after = emit_like(before, aten.ge.Scalar, document, dataflow.shape(ends)[0])
            return emit_like(before, aten.masked_fill.Scalar, document, after, -1)

        return self._once(("queries", ends, num_tokens), make)

    def aligned(self, ends: fx.Node, key_ends: fx.Node, num_tokens: Size, before: fx.Node) -> fx.Node:
        """The position among all keys that each query has, if the last query and the last key of its document meet."""

        def make() -> fx.Node:
            document = self.of_keys(ends, num_tokens, before)
            last = emit_like(before, aten.clamp_max.default, document, dataflow.shape(ends)[0] - 1)
            shift = emit_like(before, aten.sub.Tensor, key_ends, ends)
            shifts = emit_like(before, aten.index_select.default, shift, 0, last)
            return emit_like(before, aten.add.Tensor, self.positions(num_tokens, ends, before), shifts)

        return self._once(("aligned", ends, key_ends, num_tokens), make)

    def _once(self, key: Any, make: Any) -> fx.Node:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]
