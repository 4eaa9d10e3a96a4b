"""Take out of the masks of ring attention what is known before it runs.

A model may call the op itself, and not know what its mask amounts to. Before, for positions that nobody gave::

    %documents : i64[1,1,8,1] = ...   # depends on no input, and is zero everywhere
    %out = sptransform.ring_attention(%q, %k, %v, [%documents], [%documents_of_keys], mask='%2 = eq.Tensor(%0, %1)',
                                      nearest=0)

after, causal attention needs no mask, and its kernels are faster::

    %out = sptransform.ring_attention(%q, %k, %v, [], [], nearest=0)

1. Conditions that hold everywhere are dropped; those of distances become bounds (``masks/visibility.py``).
2. A mask whose operands all depend on inputs is left as it is, whatever the length.
3. Other masks of symbolic lengths are an error, so that the length is fixed, if the strategy asks for masks to be read
   (``reads_masks``), and are left as they are if not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow
from sptransform.graph.calls import op_call
from sptransform.graph.edit import emit_like, succeed
from sptransform.masks.constants import Constants
from sptransform.masks.expressions import Apply, Expression, Leaf, from_the_right, program_of
from sptransform.masks.visibility import Band, Visibility
from sptransform.op_rules.attention import RING_ATTENTION
from sptransform.ops.mask_program import MaskProgram, Ref, parse
from sptransform.sharding.sizes import SymbolicSizeError

_LENGTH = 2


@dataclass(frozen=True)
class SimplifyMasks(Pass):
    requires = frozenset({"functional"})
    ensures = frozenset({"functional"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        inputs = _depending_on_inputs(graph)
        nodes = [node for node in graph.nodes if node.target is RING_ATTENTION and node.kwargs.get("mask")]
        for node in nodes:
            rows, columns = node.args[3:5]
            if inputs.issuperset([*rows, *columns]):
                continue
            query, key = (dataflow.shape(x) for x in node.args[:2])
            if not isinstance(query[_LENGTH], int) or not isinstance(key[_LENGTH], int):
                if not context.strategy.reads_masks:
                    continue
                raise SymbolicSizeError(f"the positions that the mask of %{node.name} compares are those of one length")
            leaves = [Leaf(x, from_the_right(len(dataflow.shape(x))), node) for x in (*rows, *columns)]
            constants = Constants(max(query[_LENGTH], key[_LENGTH]) * query[0])
            mask = _expression(parse(node.kwargs["mask"]), leaves)
            visible = Visibility(query[_LENGTH], key[_LENGTH], constants).of(mask)
            program, rows, columns = ("", [], []) if visible.rest is None else program_of(visible.rest)
            call = op_call(node)
            band = Band(call.argument("nearest"), call.argument("farthest")) & visible.band
            new = emit_like(
                node,
                RING_ATTENTION,
                *node.args[:3],
                [leaf.node for leaf in rows],
                [leaf.node for leaf in columns],
                *node.args[5:],
                **node.kwargs | {"mask": str(program), "nearest": band.nearest, "farthest": band.farthest},
            )
            succeed(node, new)
        graph.eliminate_dead_code()


def _depending_on_inputs(graph: fx.Graph) -> set[fx.Node]:
    """The nodes computed from what an input holds; that its sizes are read does not count."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        is_tensor = bool(dataflow.values(node))
        if is_tensor and (node.op == "placeholder" or any(x in found for x in dataflow.operands(node))):
            found.add(node)
    return found


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
