"""Take out of the masks of ring attention what is known before it runs.

A model may call the op itself, and not know what its mask amounts to. Before, for positions that nobody gave::

    %documents : i64[1,1,8,1] = ...   # depends on no input, and is zero everywhere
    %out = sptransform.ring_attention(%q, %k, %v, [%documents], [%documents_of_keys], mask='%2 = eq.Tensor(%0, %1)',
                                      nearest=0)

after, causal attention needs no mask, and its kernels are faster::

    %out = sptransform.ring_attention(%q, %k, %v, [], [], nearest=0)

1. Conditions that hold everywhere are dropped; those of distances become bounds (``masks/visibility.py``).
2. What depends on an input stays, and the program is about it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow
from sptransform.graph.calls import op_call
from sptransform.graph.edit import succeed
from sptransform.masks.bands import Band
from sptransform.masks.closed_forms import ClosedForms
from sptransform.masks.constants import Constants
from sptransform.masks.expressions import KEYS, QUERIES, Apply, Expression, Leaf, from_the_right
from sptransform.masks.mask_read import MaskRead, emit_attention
from sptransform.masks.visibility import Visibility
from sptransform.op_rules.attention import RING_ATTENTION
from sptransform.ops.mask_program import MaskProgram, Ref, parse

_LENGTH = 2


@dataclass(frozen=True)
class SimplifyMasks(Pass):
    requires = frozenset({"functional"})
    ensures = frozenset({"functional"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        forms = ClosedForms(context.rules)
        nodes = [node for node in graph.nodes if node.target is RING_ATTENTION and _has_own_mask(node)]
        for node in nodes:
            leaves = [Leaf(x, from_the_right(len(dataflow.shape(x))), node) for x in (*node.args[3], *node.args[4])]
            query, key = (dataflow.shape(x)[_LENGTH] for x in node.args[:2])
            constants = Constants(max(_num_entries(leaf) for leaf in leaves), forms)
            visible = Visibility(query, key, constants).of(_expression(parse(node.kwargs["mask"]), leaves))
            call = op_call(node)
            band = Band(call.argument("nearest"), call.argument("farthest")) & visible.band
            new = emit_attention(node, node.args[:3], MaskRead.of(visible), band, *node.args[5:6], **node.kwargs)
            succeed(node, new)
        graph.eliminate_dead_code()


def _has_own_mask(node: fx.Node) -> bool:
    """Whether the mask is a program, and not one that looks up in tables, which a model itself does not write."""
    tables = node.args[6] if len(node.args) > 6 else node.kwargs.get("tables")
    return bool(node.kwargs.get("mask")) and not tables


def _num_entries(leaf: Leaf) -> int:
    """0 of a tensor that is no vector of queries or keys, or whose size is not known."""
    shape = dataflow.shape(leaf.node)
    is_known = all(isinstance(size, int) for size in shape)
    return prod(shape) if is_known and not (leaf.has(QUERIES) and leaf.has(KEYS)) else 0


def _expression(program: MaskProgram, operands: Sequence[Leaf]) -> Expression:
    """The program over ``operands`` as an expression."""
    parts: list[Expression] = list(operands)
    samples = [torch.zeros((1, 1, 1, 1), dtype=leaf.dtype) for leaf in operands]  # they show the dtypes of results
    for step in program.steps:
        args = [_put(x, samples) for x in step.args]
        samples.append(step.target(*args, **{name: _put(x, samples) for name, x in step.kwargs}))
        named = {name: _put(x, parts) for name, x in step.kwargs}
        parts.append(Apply(step.target, tuple(_put(x, parts) for x in step.args), named, samples[-1].dtype))
    return parts[-1]


def _put(x: Any, values: Sequence[Any]) -> Any:
    return values[x.index] if isinstance(x, Ref) else x
