"""Reads what stands between the product and the softmax of attention that is spelled out, from the last op on.

1. A product with a number is part of the scale; with a tensor that is the same for all keys, a factor.
2. A tensor that is added, or says where a number is filled in, is a term of the mask.
3. What is added to a whole row, the softmax cancels: a number, or a maximum of the row.
4. A product with a number, ``tanh``, a product: a softcap. Nothing but products may come before it.
5. One more column, joined to the keys: sinks, if it has neither queries nor the batch. What comes before it is done to
   the scores alone, and the softmax cancels nothing of it; what comes after it, to the sinks too: products, and 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from sptransform.graph import dataflow
from sptransform.graph.calls import op_call
from sptransform.masks.carried import AtomDims, has_one_entry, number_of, source_of
from sptransform.op_rules.mask_ops import BOUNDED, CHOICES, JOINED, MAXIMA, RETYPED, SCALES, SIGNS
from sptransform.rules.table import RuleTable


@dataclass(frozen=True)
class Term:
    """Added to the scores ``times`` over; or, with ``fill``, where it is true the scores become this number.

    ``dims`` and ``dtype`` are those of the scores, to which ``tensor`` broadcasts; ``negated``: where it is false.
    """

    tensor: fx.Node
    dims: AtomDims
    dtype: torch.dtype
    times: float = 1.0
    fill: float | None = None
    negated: bool = False


@dataclass(frozen=True)
class Sinks:
    """``times`` of ``tensor``, whose dimensions are ``dims``, joined to the scores of every row as one more entry."""

    tensor: fx.Node
    dims: AtomDims
    times: float


@dataclass
class Between:
    """What is done to the product.

    Attributes:
        scale: number that the product is multiplied by.
        factors: ops, and their second operands, the same for all keys: the product is multiplied by them too.
        softcap: then the scores are ``softcap * tanh(score / softcap)``; 0 is none.
        terms: what is done to the scores then, in order.
        sinks: one more entry of every row.
    """

    scale: float = 1.0
    factors: list[tuple[Any, Term]] = field(default_factory=list)
    softcap: float = 0.0
    terms: list[Term] = field(default_factory=list)
    sinks: Sinks | None = None


def column_of(node: fx.Node, scores: fx.Node, dim: int) -> fx.Node | None:
    """What ``node``, of ``JOINED``, joins to ``scores`` along ``dim`` (the last is -1) as one more entry; else None."""
    operands, num_dims = dataflow.operands(node), len(dataflow.shape(node))
    if len(operands) != 2 or operands.count(scores) != 1 or op_call(node).argument("dim") % num_dims - num_dims != dim:
        return None
    (column,) = (x for x in operands if x is not scores)
    shape = [*dataflow.shape(scores)]
    shape[dim] = 1
    return column if list(dataflow.shape(column)) == shape else None


@dataclass
class _Reader:
    """Walks back from the softmax; ``nodes`` begin with the product.

    ``is_joined``: what is being read is done to sinks too.
    """

    nodes: list[fx.Node]
    places: dict[fx.Node, AtomDims]
    dim: int
    rules: RuleTable
    found: Between = field(default_factory=Between)
    is_joined: bool = False

    def read(self, carrier: fx.Node, node: fx.Node) -> bool:
        """Read ``node``, which is done to ``carrier``; False if it cannot be read."""
        if node.target in SCALES:
            return self._scale(node)
        if node.target in BOUNDED:
            return self._cap()
        if node.target in JOINED:
            return self._join(carrier, node)
        if node.target in SIGNS:
            return self._add(carrier, node)
        if node.target in CHOICES:
            return self._fill(carrier, node)
        return True

    @property
    def _is_settled(self) -> bool:
        """Whether nothing may be added: before a softcap, or to sinks as well."""
        return self.found.softcap != 0 or self.is_joined

    def _scale(self, node: fx.Node) -> bool:
        factor = number_of(node.args[1])
        if factor == 0 or (factor is None and not self._is_factor(node)):
            return False
        if factor is None:
            self.found.factors.append((node.target, self._term(node.args[1], node)))
        else:
            self.found.scale *= SCALES[node.target](factor)
        return True

    def _is_factor(self, node: fx.Node) -> bool:
        """Whether each row of scores, of whatever head, is multiplied by one number. It must not change their dtype."""
        scores, factor = node.args[:2]
        if has_one_entry(factor):
            return True
        if not dataflow.is_tensor(factor) or self._varies(factor) or self.is_joined:
            return False
        before, after = (dataflow.value(x) for x in (scores, node))
        return (before.shape, before.dtype) == (after.shape, after.dtype)

    def _cap(self) -> bool:
        if self._is_settled or self.found.factors or self.found.scale <= 0:
            return False
        # cap * tanh(s / cap): dividing by cap comes next, if it is not a part of another number
        self.found.softcap = self.found.scale
        return True

    def _join(self, carrier: fx.Node, node: fx.Node) -> bool:
        column = column_of(node, carrier, self.dim)
        if column is None or self.found.factors:
            return False
        dims = list(self.places[node])
        dims[self.dim] = []
        source = source_of(column, dims, self.rules)
        if source is None:
            return False
        self.found.sinks = Sinks(*source, self.found.scale)
        self.is_joined = False
        return True

    def _add(self, carrier: fx.Node, node: fx.Node) -> bool:
        other = node.args[1] if node.args[0] is carrier else node.args[0]
        # a softmax cancels what does not vary along its dimension
        is_cancelled = self.found.softcap == 0 and self.found.sinks is None
        if number_of(other) is not None:
            return is_cancelled
        if not dataflow.is_tensor(other):
            return False
        if not self._varies(other):
            return is_cancelled and _is_maximum(other, self.nodes)  # else its gradient may be zero, and not none
        if self._is_settled or self.found.factors:
            return False
        self.found.terms.append(self._term(other, node, times=self.found.scale * SIGNS[node.target]))
        return True

    def _fill(self, carrier: fx.Node, node: fx.Node) -> bool:
        condition, chosen, otherwise = (node.args[i] for i in CHOICES[node.target])
        fill = number_of(otherwise if chosen is carrier else chosen)
        times, lowest = self.found.scale, torch.finfo(dataflow.value(node).dtype).min
        if self._is_settled or fill is None or times <= 0:
            return False
        if fill != -math.inf and (times != 1.0 or self.found.factors or fill > lowest):
            return False
        self.found.terms.append(self._term(condition, node, fill=fill, negated=chosen is carrier))
        return True

    def bias(self, product: fx.Node, bias: fx.Node) -> bool:
        """Read what the product is added to, ``beta * bias + alpha * product``."""
        alpha, beta = (float(op_call(product).argument(name)) for name in ("alpha", "beta"))
        if beta != 0:  # of 0 the bias is not read, whatever it is
            if self._is_settled or self.found.factors or not self._varies(bias):
                return False
            self.found.terms.append(self._term(bias, product, times=self.found.scale * beta))
        self.found.scale *= alpha
        return True

    def _term(self, tensor: fx.Node, node: fx.Node, **how: Any) -> Term:
        return Term(tensor, self.places[node], dataflow.value(node).dtype, **how)

    def _varies(self, x: fx.Node) -> bool:
        """Whether ``x``, which broadcasts to the scores, has their keys."""
        shape = dataflow.shape(x)
        return len(shape) >= -self.dim and shape[self.dim] != 1


def between(
    product: fx.Node,
    bias: fx.Node | None,
    following: Sequence[fx.Node],
    places: dict[fx.Node, AtomDims],
    dim: int,
    rules: RuleTable,
) -> Between | None:
    """What ``following`` does to ``product``, before a softmax; None if it cannot be read.

    Args:
        product: the contraction of queries and keys, added to ``bias`` if there is one.
        following: the nodes from there to the softmax, each of which reads the one before it.
        places: atoms of the dimensions of all of them. One that has sinks too has the atoms of the scores.
        dim: of the softmax, from the last: -1.
    """
    nodes = [product, *following]
    reader = _Reader(nodes, places, dim, rules, is_joined=any(node.target in JOINED for node in following))
    if not all(reader.read(carrier, node) for carrier, node in reversed(list(pairwise(nodes)))):
        return None
    if bias is not None and not reader.bias(product, bias):
        return None
    found = reader.found
    found.terms.reverse()
    # what is filled in hides what was there before, and is changed by what is added after
    fills = {term.fill for term in found.terms}
    return None if len(fills) > 1 and fills - {None, -math.inf} else found


def _is_maximum(x: Any, scores: list[fx.Node]) -> bool:
    """Whether ``x`` is a maximum of scores."""
    while isinstance(x, fx.Node) and (x.target in RETYPED or dataflow.projection(x) is not None):
        x = x.args[0]
    return isinstance(x, fx.Node) and x.target in MAXIMA and x.args[0] in scores
