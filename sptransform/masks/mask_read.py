"""A mask that was read, as arguments of ring attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sptransform.graph.edit import emit_like
from sptransform.masks.bands import Band
from sptransform.masks.expressions import KEYS, Leaf, program_of
from sptransform.masks.visibility import Visible
from sptransform.op_rules.attention import RING_ATTENTION
from sptransform.ops.mask_gradients import without_gradient


@dataclass(frozen=True)
class MaskRead:
    """A mask as arguments of the op.

    ``is_added``: the program gives numbers, not booleans; ``is_square``: an operand has the dimensions of the scores.
    ``blocking``: the op through which the gradient of an operand does not pass.
    """

    program: str = ""
    rows: list[fx.Node] = field(default_factory=list)
    columns: list[fx.Node] = field(default_factory=list)
    tables: list[fx.Node] = field(default_factory=list)
    band: Band = field(default_factory=Band)
    is_added: bool = False
    is_square: bool = False
    blocking: Any = None

    @classmethod
    def of(cls, visible: Visible, view: Callable[[Leaf], fx.Node] = lambda leaf: leaf.node) -> MaskRead:
        """The arguments of a mask that was split; ``view`` gives the node of a leaf that broadcasts to the scores."""
        if visible.rest is None:
            return cls(band=visible.band)
        program = program_of(visible.rest)
        operands = [[*map(view, leaves)] for leaves in (program.rows, program.columns, program.tables)]
        return cls(
            str(program.text),
            *operands,
            visible.band,
            is_added=visible.rest.dtype != torch.bool,
            is_square=any(leaf.has(KEYS) for leaf in program.rows),
            blocking=without_gradient(program.text, program.trained),
        )


def emit_attention(
    before: fx.Node,
    tensors: Sequence[fx.Node],
    read: MaskRead,
    band: Band,
    sinks: fx.Node | None = None,
    **options: Any,
) -> fx.Node:
    """Ring attention of ``tensors``, query, key and value, under the program of ``read`` and the bounds ``band``."""
    last = [sinks, read.tables] if read.tables else [sinks] if sinks is not None else []
    bounds = {"mask": read.program, "nearest": band.nearest, "farthest": band.farthest}
    return emit_like(before, RING_ATTENTION, *tensors, read.rows, read.columns, *last, **options | bounds)
