"""Let attention read key heads as they are, and repeat them inside the op.

Before, keys of K heads are repeated to the H query heads, and would be sent with H heads::

    %rep = aten.reshape(aten.expand(aten.unsqueeze(%k, 2), ...), ...)
    %out = aten.scaled_dot_product_attention(%q, %rep, %rep_v, %mask)

after, ``sptransform.attention`` takes ``%k`` and ``%v`` and says which key head each query head reads::

    %out = sptransform.attention(%q, %k, %v, %mask, 0.0, False, key_head_of=[0, 0, 1, 1])

1. Keys and values must both be repeated, each head ``g`` times in a row, by rearranging ops only (see
   ``op_rules/rearrangement.py``); which of them does not matter.
2. Other readers of the repeated tensors keep them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from sptransform.engine.axes import Atom, atoms_of, resolve, unify
from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow, notes
from sptransform.graph.calls import op_call, rule_at
from sptransform.graph.edit import emit_like, succeed
from sptransform.op_rules.attention import ATTENTION, mask_of, sinks_of, softcap_of
from sptransform.op_rules.rearrangement import REARRANGEMENTS
from sptransform.rules.table import RuleTable
from sptransform.sharding.sizes import number

_HEADS = 1


@dataclass(frozen=True)
class UnrepeatKeyHeads(Pass):
    requires = frozenset({"functional"})
    ensures = frozenset({"functional"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        for node in list(graph.nodes):
            if node.target not in ATTENTION:
                continue
            call = op_call(node)
            is_ours = node.target is torch.ops.sptransform.attention.default
            query, key, value = node.args[:3]
            if len(call.operand_shapes[0]) != 4 or dataflow.shape(query)[_HEADS] != dataflow.shape(key)[_HEADS]:
                continue
            sources = [unrepeated(x, _HEADS, context.rules) for x in (key, value)]
            if None in sources or sources[0][1] != sources[1][1]:
                continue
            (key, group), (value, _) = sources
            new = emit_like(
                node,
                torch.ops.sptransform.attention.default,
                query,
                key,
                value,
                mask_of(node),
                call.argument("dropout_p"),
                call.argument("is_causal"),
                scale=call.argument("scale"),
                sinks=sinks_of(node),
                softcap=softcap_of(node),
                key_head_of=[i // group for i in range(number(dataflow.shape(query)[_HEADS]))],
                explicit=is_ours and call.argument("explicit"),
            )
            succeed(node, new)
        graph.eliminate_dead_code()


def unrepeated(x: fx.Node, dim: int, rules: RuleTable) -> tuple[fx.Node, int] | None:
    """(source, times) where ``x`` is ``source`` with every index of ``dim`` repeated ``times`` in a row; else None."""
    dims = list(map(atoms_of, dataflow.shape(x)))
    current, want = x, dims
    # not through a region without gradients: what is read instead would have some
    while (
        current.target in REARRANGEMENTS and len(dataflow.operands(current)) == 1 and notes.passes_gradients(current)
    ):
        rule = rule_at(current, rules)
        if rule is None:
            return None
        factors = {name: atoms_of(size) for name, size in rule.sizes.items()}
        for atoms, names in zip(want, rule.results[0], strict=True):
            if not unify(atoms, [atom for name in names for atom in factors[name]]):
                return None
        want = [[atom for name in names for atom in factors[name]] for names in rule.operands[0]]
        current = dataflow.operands(current)[0]
        found = _repeated(dims, want, dim)
        if found is not None:
            return current, found
    return None


def _repeated(dims: list[list[Atom]], source: list[list[Atom]], dim: int) -> int | None:
    """How often ``dim`` repeats each index of the source; None if the two differ in another way."""
    if len(dims) != len(source):
        return None
    for d, (atoms, own) in enumerate(zip(dims, source, strict=True)):
        if d != dim and resolve(atoms) != resolve(own):
            return None
    whole, own = resolve(dims[dim]), resolve(source[dim])
    if whole[: len(own)] != own or len(whole) != len(own) + 1:
        return None
    return whole[-1].size
