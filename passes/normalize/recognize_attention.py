"""Write attention that is spelled out as one node.

Before, two contractions around a softmax::

    %scores = aten.matmul(%q, %k_transposed)
    %scaled = aten.mul.Tensor(%scores, 0.5)
    %masked = aten.masked_fill.Scalar(%scaled, %hidden, -inf)
    %p = aten.softmax.int(%masked, -1)
    %out = aten.matmul(%p, %v)

after::

    %mask = aten.logical_not(%hidden)
    %out = aten.scaled_dot_product_attention(%q, %k, %v, %mask, 0.0, False, scale=0.5)

1. Which dimensions are queries, keys, heads and batch is read from the rules of the two contractions. Whatever their
   layout, reshapes and permutes put them in order.
2. What stands between the contractions is read by ``masks/between.py``. Where it is something else, attention is left
   as it is. Where something else reads the probabilities too, they are computed for it as they were, with all queries
   and all keys; so attention is left if its dropout draws numbers.
3. A batch of heads, ``[batch * heads, ..]``, is taken apart where the graph shows how it was made.
4. Where other attention shows what the sequences are, only attention among the tokens of a sequence is read.
5. Keys or values that are parameters are no keys or values: that is a table read by weights.
6. Under a softcap, with sinks or with a mask that is added it is ``sptransform.attention``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from sptransform.engine.axes import Atom, Axes, resolve
from sptransform.engine.context import Context
from sptransform.engine.pass_manager import Pass
from sptransform.graph import dataflow, notes
from sptransform.graph.calls import rule_at
from sptransform.graph.edit import emit_like, succeed
from sptransform.masks.between import Term
from sptransform.masks.carried import has_one_entry
from sptransform.masks.reader import leaves_own_keys, num_entries
from sptransform.masks.scores import Spelling, spelled_at
from sptransform.op_rules.mask_ops import SOFTMAX
from sptransform.rules.table import RuleTable
from sptransform.sharding.sizes import Size

aten = torch.ops.aten

Group = list[Atom]


@dataclass(frozen=True)
class RecognizeAttention(Pass):
    requires = frozenset({"functional"})
    ensures = frozenset({"functional"})

    def run(self, graph: fx.Graph, context: Context) -> None:
        graph.eliminate_dead_code()  # a reader of the probabilities that nobody reads
        for node in _of_sequences(graph, context):
            spelling = spelled_at(node, context.rules)
            if spelling is not None:
                _join(spelling, context.rules)
        graph.eliminate_dead_code()


def _of_sequences(graph: fx.Graph, context: Context) -> list[fx.Node]:
    """The softmaxes that may be attention among tokens.

    If there is attention that is not spelled out, it tells what the sequences are, and attention over another axis (the
    tokens of a block, the heads of a token, channels) is like any other op.
    """
    softmaxes = [node for node in graph.nodes if node.target in SOFTMAX]
    if not softmaxes:
        return []
    rules = {node: rule_at(node, context.rules) for node in graph.nodes if dataflow.handles_tensors(node)}
    if not any(rule is not None and rule.has_sequence for rule in rules.values()):
        return softmaxes
    for node, rule in rules.items():
        notes.note(node).rule = rule
    axes = Axes(graph, context.divide, context.sequence_dims)
    for node in rules:
        notes.note(node).rule = None  # to be given once no pass changes the graph any more
    return [node for node in softmaxes if _is_among_tokens(spelled_at(node, context.rules), axes)]


def _is_among_tokens(spelling: Spelling | None, axes: Axes) -> bool:
    if spelling is None:
        return False
    ends = (spelling.query, spelling.query_dims, spelling.queries), (spelling.key, spelling.key_dims, spelling.keys)
    for node, dims, own in ends:
        found = [axes.dims(node)[i] for i, atoms in enumerate(dims) if resolve(atoms) == resolve(own)]
        if not any(map(axes.is_whole_sequence, found)):
            return False
    return True


def _join(spelling: Spelling, rules: RuleTable) -> None:
    old = spelling.out
    groups = spelling.groups
    query, key, value = (
        _ordered(x, dims, [*groups, *last], old)
        for x, dims, last in (
            (spelling.query, spelling.query_dims, (spelling.queries, spelling.contracted)),
            (spelling.key, spelling.key_dims, (spelling.keys, spelling.contracted)),
            (spelling.value, spelling.value_dims, (spelling.keys, spelling.width)),
        )
    )
    dtypes = [dataflow.value(x).dtype for x in (query, key, value)]
    dtype = functools.reduce(torch.promote_types, [*dtypes, *_wider_than_float32(spelling)])
    query, key, value = (_cast(x, dtype, old) for x in (query, key, value))
    hidden, everywhere = _hidden(spelling, rules)
    added = _added(spelling)
    if everywhere is not None:
        # filled with one number, all scores of a row are equal and have no gradient: as those of a query of zeros
        query = emit_like(old, aten.where.ScalarSelf, everywhere, 0.0, query)
    read = spelling.scores
    for op, term in read.factors:
        one = has_one_entry(term.tensor)
        query = emit_like(old, op, query, term.tensor if one else _cast(_broadcast(term, spelling), dtype, old))
    mask = added
    if hidden is not None:
        seen = aten.logical_not.default, hidden
        mask = emit_like(old, *(seen if added is None else (aten.where.ScalarSelf, hidden, float("-inf"), added)))
    arguments = query, key, value, mask, spelling.dropout_p, False
    if added is None and read.softcap == 0 and read.sinks is None:
        new = emit_like(old, aten.scaled_dot_product_attention.default, *arguments, scale=read.scale)
    else:
        # in a row of which all keys are masked by a large number, kernels that keep a logsumexp lose its digits
        op = torch.ops.sptransform.attention.default
        named = {"softcap": read.softcap, "explicit": added is not None}
        if read.sinks is not None:
            named["sinks"] = _sinks(spelling)
        new = emit_like(old, op, *arguments, scale=read.scale, **named)
    made = [*groups, spelling.queries, spelling.width]
    new = _ordered(new, made, [resolve(atoms) for atoms in spelling.out_dims], old)
    succeed(old, _cast(new, dataflow.value(old).dtype, old))
    for node in reversed(spelling.path):  # dropout would be kept: it draws random numbers
        if not node.users:
            node.graph.erase_node(node)


def _ordered(x: fx.Node, dims: Sequence[Group], groups: Sequence[Group], before: fx.Node) -> fx.Node:
    """``x``, whose dimensions are products of atoms, with one dimension for each of ``groups``."""
    flat = [atom for atoms in dims for atom in resolve(atoms)]
    order = [flat.index(atom) for group in groups for atom in group]
    if order != list(range(len(flat))):
        x = _reshaped(x, [atom.size for atom in flat], before)
        x = emit_like(before, aten.permute.default, x, order)
    return _reshaped(x, [prod(atom.size for atom in group) for group in groups], before)


def _reshaped(x: fx.Node, shape: list[Size], before: fx.Node) -> fx.Node:
    return x if list(dataflow.shape(x)) == shape else emit_like(before, aten.reshape.default, x, shape)


def _cast(x: fx.Node, dtype: torch.dtype, before: fx.Node) -> fx.Node:
    return x if dataflow.value(x).dtype == dtype else emit_like(before, aten.to.dtype, x, dtype)


def _wider_than_float32(spelling: Spelling) -> list[torch.dtype]:
    """Dtypes in which something is added to the scores, if attention of 32 bits or fewer would not compute in them."""
    return [term.dtype for term in spelling.scores.terms if term.dtype == torch.float64]


def _added(spelling: Spelling) -> fx.Node | None:
    """The sum of all that is added to the scores, each in the dtype that the scores have there."""
    before, added = spelling.out, None
    for term in spelling.scores.terms:
        if term.fill is None:
            own = _cast(_broadcast(term, spelling), term.dtype, before)
            if term.times != 1.0:
                own = emit_like(before, aten.mul.Scalar, own, term.times)
            added = own if added is None else emit_like(before, aten.add.Tensor, added, own)
    return added


def _hidden(spelling: Spelling, rules: RuleTable) -> tuple[fx.Node | None, fx.Node | None]:
    """Where scores become -inf; and the rows of which every key is hidden, if that is by the lowest number.

    In such a row a softmax makes all keys equal: none is hidden there, unless it has a sink, beside which they vanish.
    Where every query sees its own key there is no such row.
    """
    before = spelling.out
    fills = [(_condition(term, spelling), term.fill) for term in spelling.scores.terms if term.fill is not None]
    hidden = None
    for condition, _ in fills:
        hidden = condition if hidden is None else emit_like(before, aten.logical_or.default, hidden, condition)
    if spelling.scores.sinks is not None or all(fill == float("-inf") for _, fill in fills):
        return hidden, None
    if leaves_own_keys(hidden, num_entries(spelling.query), rules):
        return hidden, None
    everywhere = emit_like(before, aten.all.dim, hidden, -1, True)
    elsewhere = emit_like(before, aten.logical_not.default, everywhere)
    return emit_like(before, aten.logical_and.default, hidden, elsewhere), everywhere


def _sinks(spelling: Spelling) -> fx.Node:
    """The sinks of all heads, in one dimension."""
    before, sinks, heads = spelling.out, spelling.scores.sinks, spelling.groups[1]
    own = {atom for atoms in sinks.dims for atom in resolve(atoms)}
    x = _ordered(sinks.tensor, sinks.dims, [[atom] for atom in heads if atom in own], before)
    if len(own) < len(heads):
        x = _reshaped(x, [atom.size if atom in own else 1 for atom in heads], before)
        x = emit_like(before, aten.expand.default, x, [atom.size for atom in heads])
    x = _reshaped(x, [prod(atom.size for atom in heads)], before)
    return x if sinks.times == 1.0 else emit_like(before, aten.mul.Scalar, x, sinks.times)


def _condition(term: Term, spelling: Spelling) -> fx.Node:
    """Where the term fills in its number."""
    tensor = _cast(_broadcast(term, spelling), torch.bool, spelling.out)
    return emit_like(spelling.out, aten.logical_not.default, tensor) if term.negated else tensor


def _broadcast(term: Term, spelling: Spelling) -> fx.Node:
    """The term's tensor, so that it broadcasts to ``[batch, heads, queries, keys]``."""
    before, x = spelling.out, term.tensor
    groups = [*spelling.groups, spelling.queries, spelling.keys]
    shape = dataflow.shape(x)
    aligned = [resolve(atoms) for atoms in term.dims[len(term.dims) - len(shape) :]]
    extent = {
        atom: 1 if size == 1 else atom.size for atoms, size in zip(aligned, shape, strict=True) for atom in atoms
    }
    flat = list(extent)
    order = [flat.index(atom) for group in groups for atom in group if atom in extent]
    is_spread = [{extent.get(atom, 1) != 1 for atom in group} == {True, False} for group in groups]
    wanted = [prod(extent.get(atom, 1) for atom in group) for group in groups]
    is_ready = order == sorted(order) and not any(is_spread) and 2 <= len(shape) <= 4
    if is_ready and wanted[4 - len(shape) :] == list(shape):
        return x
    if order != sorted(order):
        x = _reshaped(x, [extent[atom] for atom in flat], before)
        x = emit_like(before, aten.permute.default, x, order)
    if any(is_spread):  # of two heads' dims it has one
        every = [atom for group in groups for atom in group]
        x = _reshaped(x, [extent.get(atom, 1) for atom in every], before)
        spread = {atom for group, own in zip(groups, is_spread, strict=True) if own for atom in group}
        x = emit_like(
            before, aten.expand.default, x, [a.size if a in spread else extent.get(a, 1) for a in every]
        )
        wanted = [
            prod(a.size for a in group) if own else size
            for group, own, size in zip(groups, is_spread, wanted, strict=True)
        ]
    return _reshaped(x, wanted, before)
