"""Ops whose result entries are operand entries, rearranged or repeated: nothing is computed."""

from __future__ import annotations

import torch

aten = torch.ops.aten


REARRANGEMENTS = frozenset(
    {
        aten._reshape_alias.default,
        aten._unsafe_view.default,
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.expand.default,
        aten.flatten.using_ints,
        aten.mT.default,
        aten.numpy_T.default,
        aten.permute.default,
        aten.repeat_interleave.self_int,
        aten.reshape.default,
        aten.squeeze.dim,
        aten.t.default,
        aten.transpose.int,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.view.default,
    }
)

# Those that keep the entries in row-major order
RESHAPES = frozenset(
    {
        aten._reshape_alias.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.reshape.default,
        aten.unflatten.int,
        aten.view.default,
    }
)
