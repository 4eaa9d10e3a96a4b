"""Reads attention that is spelled out: two contractions around a softmax, and what stands between them.

No op's layout is known here. Dimensions are products of atoms (:mod:`sptransform.engine.axes`), and the rules of the
contractions say which of them are contracted, shared, or of one operand alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from sptransform.engine.axes import Atom, atoms_of, resolve, unify
from sptransform.graph import dataflow, notes
from sptransform.graph.calls import op_call, rule_at
from sptransform.op_rules.mask_ops import BIASED, CHOICES, DETACHING, DROPOUT, FILLED, MAXIMA, RETYPED, SCALES, SIGNS
from sptransform.op_rules.rearrangement import REARRANGEMENTS
from sptransform.rules.rule import Dims
from sptransform.rules.table import RuleTable

AtomDims = list[list[Atom]]


@dataclass(frozen=True)
class Term:
    """Added to the scores ``times`` over; or, with ``fill``, where it is true the scores become this number.

    ``dims`` are those of the scores that ``tensor`` broadcasts to; ``negated``: where it is false.
    """

    tensor: fx.Node
    dims: AtomDims
    times: float = 1.0
    fill: float | None = None
    negated: bool = False


@dataclass
class Spelling:
    """Attention, found. Of each tensor its node, and the atoms of every dimension.

    Attributes:
        groups: atoms of the batch, and of the heads.
        queries, keys, contracted, width: atoms of the other dimensions: of queries and keys, of both, of values.
        scale: number that the product is multiplied by.
        factors: ops, and their second operands, tensors of no dimensions: the product is multiplied by them too.
        between: the nodes that compute the probabilities, in order.
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    out: fx.Node
    query_dims: AtomDims
    key_dims: AtomDims
    value_dims: AtomDims
    out_dims: AtomDims
    groups: AtomDims
    queries: list[Atom]
    keys: list[Atom]
    contracted: list[Atom]
    width: list[Atom]
    scale: float
    factors: list[tuple[Any, fx.Node]]
    terms: list[Term]
    dropout_p: float
    between: list[fx.Node]

    @property
    def is_complete(self) -> bool:
        """Whether every tensor has the atoms that attention says, each once."""
        batch = [atom for group in self.groups for atom in group]
        stated = (
            (self.query_dims, [*batch, *self.queries, *self.contracted]),
            (self.key_dims, [*batch, *self.keys, *self.contracted]),
            (self.value_dims, [*batch, *self.keys, *self.width]),
            (self.out_dims, [*batch, *self.queries, *self.width]),
        )
        return all(_same(dims, atoms) for dims, atoms in stated)


def _same(dims: AtomDims, atoms: list[Atom]) -> bool:
    found = [atom for own in dims for atom in resolve(own)]
    return len(found) == len(atoms) and set(found) == set(atoms)


@dataclass
class _Contraction:
    """A node that sums products of two of its operands, and atoms of all dimensions."""

    node: fx.Node
    operands: tuple[fx.Node, fx.Node]
    dims: tuple[AtomDims, AtomDims]
    out_dims: AtomDims
    contracted: list[Atom]
    bias: fx.Node | None = None

    def own(self, index: int) -> list[Atom]:
        """Atoms that only one operand has."""
        other = {atom for atoms in self.dims[1 - index] for atom in resolve(atoms)}
        return [atom for atoms in self.dims[index] for atom in resolve(atoms) if atom not in other]


@dataclass
class _Reading:
    """One softmax and what is known of it so far."""

    softmax: fx.Node
    rules: RuleTable

    def run(self) -> Spelling | None:
        found = self._after()
        path = self._path(self.softmax.args[0], set())
        if found is None or path is None:
            return None
        weighted, dropout_p, following = found
        scores, *between = path
        places = {scores.node: scores.out_dims}
        for before, node in pairwise([scores.node, *between, self.softmax, *following]):
            dims = self._carried(before, node, places[before])
            if dims is None:
                return None
            places[node] = dims
        read = self._terms(scores, between, places)
        probabilities = (following or [self.softmax])[-1]
        at = weighted.operands.index(probabilities)
        if read is None or not _unified(places[probabilities], weighted.dims[at]):
            return None
        return self._assembled(scores, weighted, at, *read, dropout_p, places)

    def _after(self) -> tuple[_Contraction, float, list[fx.Node]] | None:
        """The contraction that reads the probabilities, their dropout, and the nodes before it; None if others do."""
        node, dropout_p, between = self.softmax, 0.0, []
        while len(node.users) == 1:
            (user,) = node.users
            weighted = _contraction(user, self.rules)
            if weighted is not None:
                is_read = node in weighted.operands and weighted.bias is None
                return (weighted, dropout_p, between) if is_read else None
            if user.target in DROPOUT and dropout_p == 0.0:
                dropout_p = DROPOUT[user.target](op_call(user))
            elif not _is_cast(user) and user.target not in REARRANGEMENTS:
                return None
            between.append(user)
            node = user
        return None

    def _path(self, node: Any, seen: set[fx.Node]) -> list[Any] | None:
        """The contraction that makes the scores, and the nodes from there to ``node``."""
        if not isinstance(node, fx.Node) or node in seen:
            return None
        seen.add(node)
        found = _contraction(node, self.rules)
        if found is not None:
            return [found]
        for carrier in _carriers(node):
            path = self._path(carrier, seen)
            if path is not None:
                return [*path, node]
        return None

    def _carried(self, before: fx.Node, node: fx.Node, dims: AtomDims) -> AtomDims | None:
        """The dimensions after ``node``, which changes none of those of ``before``, or rearranges them."""
        if node.target not in REARRANGEMENTS:
            return dims if dataflow.shape(node) == dataflow.shape(before) else None
        rule = rule_at(node, self.rules)
        if rule is None or rule.resize:
            return None
        atoms = {factor: atoms_of(size) for factor, size in rule.sizes.items()}
        if not _unified(dims, _dims(rule.operands[0], atoms)):
            return None
        return _dims(rule.results[0], atoms)

    def _terms(
        self, scores: _Contraction, between: list[fx.Node], places: dict[fx.Node, AtomDims]
    ) -> tuple[float, list[tuple[Any, fx.Node]], list[Term]] | None:
        """What the product is multiplied by, and what else the softmax reads. From the last op to the first."""
        times, terms, factors = 1.0, [], []
        nodes = [scores.node, *between]
        for carrier, node in reversed(list(pairwise(nodes))):
            if node.target in SCALES:
                factor = _number(node.args[1])
                if factor == 0 or (factor is None and not _has_no_dims(node.args[1])):
                    return None
                if factor is None:
                    factors.append((node.target, node.args[1]))
                else:
                    times *= SCALES[node.target](factor)
            elif node.target in SIGNS:
                other = node.args[1] if node.args[0] is carrier else node.args[0]
                if _number(other) is not None:
                    continue  # a softmax cancels what does not vary along its dimension
                if not dataflow.is_tensor(other):
                    return None
                if not self._varies(other, places[node]):
                    if not _is_maximum(other, nodes):
                        return None  # it may be trainable, and its gradient is zero, not none
                    continue
                if factors:
                    return None
                terms.append(Term(other, places[node], times * SIGNS[node.target]))
            elif node.target in CHOICES:
                condition, chosen, otherwise = (node.args[i] for i in CHOICES[node.target])
                fill = _number(otherwise if chosen is carrier else chosen)
                lowest = torch.finfo(dataflow.value(node).dtype).min
                if fill is None or times <= 0 or not (
                    fill == -math.inf or (times == 1.0 and not factors and fill <= lowest)
                ):
                    return None
                terms.append(Term(condition, places[node], fill=fill, negated=chosen is carrier))
        if scores.bias is not None:
            alpha, beta = (float(op_call(scores.node).argument(name)) for name in ("alpha", "beta"))
            if beta != 0:  # of 0 the bias is not read, whatever it is
                if factors or not self._varies(scores.bias, scores.out_dims):
                    return None
                terms.append(Term(scores.bias, scores.out_dims, times * beta))
            times *= alpha
        # what is filled in hides what was there before, and is changed by what is added after
        fills = {term.fill for term in terms}
        if len(fills) > 1 and fills - {None, -math.inf}:
            return None
        return times, factors, terms[::-1]

    def _dim(self, dims: AtomDims) -> int:
        return op_call(self.softmax).argument("dim") % len(dims)

    def _varies(self, x: fx.Node, dims: AtomDims) -> bool:
        """Whether ``x`` broadcasts to the scores and has their keys."""
        shape = dataflow.shape(x)
        at = self._dim(dims) - (len(dims) - len(shape))
        return at >= 0 and shape[at] != 1

    def _assembled(
        self,
        scores: _Contraction,
        weighted: _Contraction,
        at: int,
        scale: float,
        factors: list[tuple[Any, fx.Node]],
        terms: list[Term],
        dropout_p: float,
        places: dict[fx.Node, AtomDims],
    ) -> Spelling | None:
        dims = places[self.softmax]
        keys = dims[self._dim(dims)]
        (is_left, is_right) = (set(resolve(keys)) <= set(scores.own(index)) for index in (0, 1))
        if not keys or is_left == is_right or resolve(weighted.contracted) != resolve(keys):
            return None
        which = 0 if is_left else 1
        value = weighted.operands[1 - at]
        dtype = dataflow.value(value).dtype
        query, key = (_as_written(scores.operands[index], dtype) for index in (1 - which, which))
        tensors = (query, scores.dims[1 - which]), (key, scores.dims[which]), (value, weighted.dims[1 - at])
        if any(notes.region_of(node) != notes.region_of(self.softmax) for node in (*places, weighted.node)):
            return None
        if any(_is_parameter(x) for x, _ in tensors):
            return None
        batch = self._batch(scores, keys, which)
        if len(batch) == 1:  # of heads perhaps: what made the tensors may show it
            for x, own in tensors:
                self._refine(x, own)
            batch = self._batch(scores, keys, which)
        queries = scores.own(1 - which)
        if not batch or len(queries) != 1 or len(resolve(keys)) != 1:
            return None  # of several dims of queries, any may be the sequence
        found = Spelling(
            query, key, value, weighted.node,
            tensors[0][1], tensors[1][1], tensors[2][1], weighted.out_dims,
            [[], batch] if len(batch) == 1 else [batch[:1], batch[1:]],
            queries, resolve(keys), resolve(scores.contracted), weighted.own(1 - at),
            scale, factors, terms, dropout_p, list(places),
        )  # fmt: skip
        return found if found.is_complete else None

    def _batch(self, scores: _Contraction, keys: list[Atom], which: int) -> list[Atom]:
        others = {*resolve(keys), *scores.own(1 - which)}
        return [atom for atoms in scores.out_dims for atom in resolve(atoms) if atom not in others]

    def _refine(self, x: fx.Node, dims: AtomDims) -> None:
        """Divide the atoms of ``x`` as the rearrangements that made it do."""
        while x.target in REARRANGEMENTS and len(dataflow.operands(x)) == 1:
            rule = rule_at(x, self.rules)
            if rule is None or rule.resize:
                return
            atoms = {factor: atoms_of(size) for factor, size in rule.sizes.items()}
            if not _unified(dims, _dims(rule.results[0], atoms)):
                return
            dims, x = _dims(rule.operands[0], atoms), dataflow.operands(x)[0]


def spelled_at(softmax: fx.Node, rules: RuleTable) -> Spelling | None:
    """The attention around ``softmax``; None if it is not attention, or not in a way that can be read."""
    return _Reading(softmax, rules).run()


def _contraction(node: fx.Node, rules: RuleTable) -> _Contraction | None:
    """``node`` as a sum of products of two operands, perhaps with a bias; None if it is something else."""
    if not dataflow.handles_tensors(node):
        return None
    rule = rule_at(node, rules)
    is_biased = node.target in BIASED
    if rule is None or rule.resize or (not is_biased and not {frozenset({0}), frozenset({1})} <= set(rule.linear)):
        return None
    operands = dataflow.operands(node)
    if len(operands) != 2 + is_biased:
        return None
    names = [{factor for factors in dims for factor in factors} for dims in (*rule.operands[-2:], rule.results[0])]
    contracted = names[0] & names[1] - names[2]
    if len(contracted) != 1:
        return None
    atoms = {factor: atoms_of(size) for factor, size in rule.sizes.items()}
    left, right = (_dims(dims, atoms) for dims in rule.operands[-2:])
    out = _dims(rule.results[0], atoms)
    bias = operands[0] if is_biased else None
    return _Contraction(node, tuple(operands[-2:]), (left, right), out, atoms[contracted.pop()], bias)


def _dims(dims: Dims, atoms: Mapping[str, list[Atom]]) -> AtomDims:
    return [[atom for factor in factors for atom in atoms[factor]] for factors in dims]


def _unified(left: AtomDims, right: AtomDims) -> bool:
    return len(left) == len(right) and all(unify(one, other) for one, other in zip(left, right, strict=True))


def _carriers(node: fx.Node) -> Iterator[Any]:
    """The operands of ``node`` that may be the scores."""
    if _is_cast(node) or node.target in REARRANGEMENTS or node.target in SCALES:
        yield node.args[0]
    elif node.target in SIGNS and node.kwargs.get("alpha", 1) == 1:
        yield from node.args[: 2 if SIGNS[node.target] > 0 else 1]
    elif node.target in CHOICES:
        _, chosen, otherwise = CHOICES[node.target]
        yield from (node.args[chosen], node.args[otherwise])


def _is_cast(node: fx.Node) -> bool:
    """Whether the node's result is its operand, perhaps in another precision, and passes gradients."""
    if node.target not in RETYPED or node.target in DETACHING:
        return False
    return all(dataflow.value(x).dtype.is_floating_point for x in (node, node.args[0]))


def _has_no_dims(x: Any) -> bool:
    return isinstance(x, fx.Node) and dataflow.is_tensor(x) and dataflow.shape(x) == ()


def _number(x: Any) -> float | None:
    """The number that ``x`` is, written out or as a tensor of no dimensions filled with it."""
    if isinstance(x, int | float) and not isinstance(x, bool):
        return float(x)
    if isinstance(x, fx.Node) and x.target in RETYPED:
        return _number(x.args[0])
    if _has_no_dims(x) and x.target in FILLED:
        return _number(FILLED[x.target](op_call(x)))
    return None


def _is_maximum(x: Any, scores: list[fx.Node]) -> bool:
    """Whether ``x`` is a maximum of scores."""
    while isinstance(x, fx.Node) and (x.target in RETYPED or dataflow.projection(x) is not None):
        x = x.args[0]
    return isinstance(x, fx.Node) and x.target in MAXIMA and x.args[0] in scores


def _as_written(x: fx.Node, dtype: torch.dtype) -> fx.Node:
    """``x`` before it was cast from ``dtype``, for scores of another precision."""
    source = x
    while _is_cast(source) and dataflow.value(source).dtype != dtype:
        source = source.args[0]
    return source if dataflow.value(source).dtype == dtype else x


def _is_parameter(x: fx.Node) -> bool:
    while x.target in REARRANGEMENTS or x.target in RETYPED:
        x = dataflow.operands(x)[0]
    return x.op == "placeholder" and notes.note(x).is_parameter
