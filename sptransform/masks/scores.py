"""Reads attention that is spelled out: two contractions around a softmax; :mod:`between` reads what stands between.

No op's layout is known here. Dimensions are products of atoms (:mod:`sptransform.engine.axes`), and the rules of the
contractions say which of them are contracted, shared, or of one operand alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from sptransform.engine.axes import Atom, atoms_of, resolve
from sptransform.graph import dataflow, notes
from sptransform.graph.calls import op_call, rule_at
from sptransform.masks.between import Between, between, column_of
from sptransform.masks.carried import AtomDims, dims_in_atoms, is_cast, rearranged, source_of, unified
from sptransform.op_rules.mask_ops import BIASED, BOUNDED, CHOICES, DROPOUT, JOINED, RETYPED, SCALES, SIGNS, TAKEN
from sptransform.op_rules.rearrangement import REARRANGEMENTS
from sptransform.rules.table import RuleTable


@dataclass
class Spelling:
    """Attention, found. Of each tensor its node, and the atoms of every dimension.

    Attributes:
        groups: atoms of the batch, and of the heads.
        queries, keys, contracted, width: atoms of the other dimensions: of queries and keys, of both, of values.
        scores: what is done to the product before the softmax.
        path: the nodes that compute the probabilities, in order.
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
    scores: Between
    dropout_p: float
    path: list[fx.Node]

    @property
    def is_complete(self) -> bool:
        """Whether every tensor has the atoms that attention says, each once; sinks some of the heads'."""
        batch = [atom for group in self.groups for atom in group]
        stated = (
            (self.query_dims, [*batch, *self.queries, *self.contracted]),
            (self.key_dims, [*batch, *self.keys, *self.contracted]),
            (self.value_dims, [*batch, *self.keys, *self.width]),
            (self.out_dims, [*batch, *self.queries, *self.width]),
        )
        sinks = self.scores.sinks
        of_heads = sinks is None or {atom for own in sinks.dims for atom in resolve(own)} <= set(self.groups[1])
        return of_heads and all(_same(dims, atoms) for dims, atoms in stated)


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
        scores, *steps = path
        nodes = [scores.node, *steps, self.softmax, *following]
        places = self._placed(nodes, scores.out_dims)
        if places is None:
            return None
        read = between(scores.node, scores.bias, steps, places, self._dim, self.rules)
        probabilities = nodes[-1]
        at = weighted.operands.index(probabilities)
        if read is None or not unified(places[probabilities], weighted.dims[at]):
            return None
        return self._assembled(scores, weighted, at, read, dropout_p, places)

    @property
    def _dim(self) -> int:
        """The softmax's dimension, from the last: -1."""
        num_dims = len(dataflow.shape(self.softmax))
        return op_call(self.softmax).argument("dim") % num_dims - num_dims

    def _after(self) -> tuple[_Contraction, float, list[fx.Node]] | None:
        """The contraction that reads the probabilities, their dropout, and the nodes before it.

        None if there are several. Something else may read the probabilities, unless numbers are drawn for their
        dropout: it reads those that the nodes compute, which then stay.
        """
        found = list(self._readers(self.softmax, 0.0, []))
        if len(found) != 1:
            return None
        _, dropout_p, following = found[0]
        is_read = any(len(node.users) > 1 for node in (self.softmax, *following))
        return None if is_read and dropout_p > 0.0 else found[0]

    def _readers(
        self, node: fx.Node, dropout_p: float, following: list[fx.Node]
    ) -> Iterator[tuple[_Contraction, float, list[fx.Node]]]:
        for user in node.users:
            weighted = _contraction(user, self.rules)
            if weighted is not None:
                if node in weighted.operands and weighted.bias is None:
                    yield weighted, dropout_p, following
            elif user.target in DROPOUT and dropout_p == 0.0:
                yield from self._readers(user, DROPOUT[user.target](op_call(user)), [*following, user])
            elif is_cast(user) or user.target in REARRANGEMENTS or user.target in TAKEN:
                yield from self._readers(user, dropout_p, [*following, user])

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

    def _placed(self, nodes: list[fx.Node], dims: AtomDims) -> dict[fx.Node, AtomDims] | None:
        """The dimensions of all ``nodes``, each of which reads the one before it; ``dims`` are those of the first.

        Sinks may be joined, and the column left out again; in between, the dimensions are those of the scores.
        """
        places = {nodes[0]: dims}
        start = None  # of the scores in a row, while it has sinks
        for before, node in pairwise(nodes):
            if node.target in JOINED:
                if start is not None or column_of(node, before, self._dim) is None:
                    return None
                start = 0 if dataflow.operands(node)[0] is before else 1
            elif node.target in TAKEN:
                if start is None or not self._leaves_out(before, node, start):
                    return None
                start = None
            elif node.target in REARRANGEMENTS:
                ends = None if start is not None else rearranged(node, self.rules)
                if ends is None or not unified(dims, ends[0]):
                    return None
                dims = ends[1]
            elif dataflow.shape(node) != dataflow.shape(before):
                return None
            places[node] = dims
        return places  # of a row that keeps its sinks, the other contraction is of another size

    def _leaves_out(self, before: fx.Node, node: fx.Node, start: int) -> bool:
        """Whether ``node`` has all entries of ``before`` along the softmax's dimension but one, from ``start`` on."""
        rule = rule_at(node, self.rules)
        shape = list(dataflow.shape(before))
        shape[self._dim] -= 1
        if rule is None or list(dataflow.shape(node)) != shape:
            return False
        return [resize.start for resize in rule.resize.values()] == [start]

    def _assembled(
        self,
        scores: _Contraction,
        weighted: _Contraction,
        at: int,
        read: Between,
        dropout_p: float,
        places: dict[fx.Node, AtomDims],
    ) -> Spelling | None:
        dims = places[self.softmax]
        keys = dims[self._dim]
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
        batch = self._batch(scores, which)
        if len(batch) == 1:  # of heads perhaps: what made the tensors may show it
            for x, own in tensors:
                source_of(x, own, self.rules)
            batch = self._batch(scores, which)
        queries = scores.own(1 - which)
        if not batch or len(queries) != 1 or len(resolve(keys)) != 1:
            return None  # of several dims of queries, any may be the sequence
        found = Spelling(
            query, key, value, weighted.node,
            tensors[0][1], tensors[1][1], tensors[2][1], weighted.out_dims,
            [[], batch] if len(batch) == 1 else [batch[:1], batch[1:]],
            queries, resolve(keys), resolve(scores.contracted), weighted.own(1 - at),
            read, dropout_p, list(places),
        )  # fmt: skip
        return found if found.is_complete else None

    def _batch(self, scores: _Contraction, which: int) -> list[Atom]:
        others = {*resolve(scores.contracted), *scores.own(1 - which)}
        # in the order of the queries' dimensions: the batch comes before heads there, whatever becomes of the scores
        return [atom for atoms in scores.dims[1 - which] for atom in resolve(atoms) if atom not in others]


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
    left, right = (dims_in_atoms(dims, atoms) for dims in rule.operands[-2:])
    out = dims_in_atoms(rule.results[0], atoms)
    bias = operands[0] if is_biased else None
    return _Contraction(node, tuple(operands[-2:]), (left, right), out, atoms[contracted.pop()], bias)


def _carriers(node: fx.Node) -> Iterator[Any]:
    """The operands of ``node`` that may be the scores."""
    if is_cast(node) or node.target in REARRANGEMENTS or node.target in SCALES or node.target in BOUNDED:
        yield node.args[0]
    elif node.target in JOINED:
        yield from dataflow.operands(node)
    elif node.target in SIGNS and node.kwargs.get("alpha", 1) == 1:
        yield from node.args[: 2 if SIGNS[node.target] > 0 else 1]
    elif node.target in CHOICES:
        _, chosen, otherwise = CHOICES[node.target]
        yield from (node.args[chosen], node.args[otherwise])


def _as_written(x: fx.Node, dtype: torch.dtype) -> fx.Node:
    """``x`` before it was cast from ``dtype``, for scores of another precision."""
    source = x
    while is_cast(source) and dataflow.value(source).dtype != dtype:
        source = source.args[0]
    return source if dataflow.value(source).dtype == dtype else x


def _is_parameter(x: fx.Node) -> bool:
    while x.target in REARRANGEMENTS or x.target in RETYPED:
        x = dataflow.operands(x)[0]
    return x.op == "placeholder" and notes.note(x).is_parameter
