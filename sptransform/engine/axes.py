"""Axis inference: which tensor dimensions of a graph are the same logical axis, by unifying what the rules equate.

Every dimension is a product of atoms. A rule that names one factor on two dimensions unifies their atoms; a reshape
splits an atom into several. A slice or a pad *links* two atoms: another extent of the same axis. The sequence is then
whatever is unified with, or linked to, the query or key factor of an attention op. Op-agnostic.

A link may lead from a sequence to a dimension that a reshape divides, if ranks can have whole blocks of that (chunks of
tokens). Where they cannot (the tokens of an image, joined with text, then laid out as rows), the dimension is kept one
atom, and the reshape shares no axis.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from math import lcm, prod
from typing import Any

from torch import fx

from sptransform.graph import dataflow, notes
from sptransform.rules.rule import Dims, OpRule, Resize
from sptransform.sharding.partition import Partition
from sptransform.sharding.sizes import Size, SymbolicSizeError, quotient

_AGES = count()


class Atom:
    """An axis not yet divided; ``merged`` or ``parts`` is set once it is merged or divided.

    ``age`` orders atoms as they are first met in the graph. ``whole``: it is never divided.
    """

    __slots__ = ("age", "merged", "parts", "size", "whole")

    def __init__(self, size: Size, age: int | None = None, whole: bool = False) -> None:
        self.size = size
        self.age = next(_AGES) if age is None else age
        self.whole = whole
        self.merged: Atom | None = None
        self.parts: tuple[Atom, ...] | None = None


def atoms_of(size: Size, whole: bool = False) -> list[Atom]:
    """A dimension or factor of this size as atoms: one, or none if the size is 1."""
    return [Atom(size, whole=whole)] if size != 1 else []


def resolve(atoms: list[Atom]) -> list[Atom]:
    """The current indivisible representatives of ``atoms``, in order."""
    found: list[Atom] = []
    stack = list(reversed(atoms))
    while stack:
        atom = stack.pop()
        while atom.merged is not None:
            if atom.merged.merged is not None:
                atom.merged = atom.merged.merged
            atom = atom.merged
        if atom.parts is None:
            found.append(atom)
        else:
            stack.extend(reversed(atom.parts))
    return found


def unify(left: list[Atom], right: list[Atom]) -> bool:
    """Unify two products of atoms; False if their factors do not nest (they stay distinct from that point on)."""
    a, b = resolve(left)[::-1], resolve(right)[::-1]
    while a and b:
        x, y = a.pop(), b.pop()
        if x is y:
            continue
        if x.size == y.size:
            y.merged = x
            x.age = min(x.age, y.age)
            x.whole = x.whole or y.whole
        elif not x.whole and (rest := quotient(x.size, y.size)) is not None:
            x.parts = (Atom(y.size, x.age), Atom(rest, x.age))
            a.extend(resolve([x])[::-1])
            b.append(y)
        elif not y.whole and (rest := quotient(y.size, x.size)) is not None:
            y.parts = (Atom(x.size, y.age), Atom(rest, y.age))
            b.extend(resolve([y])[::-1])
            a.append(x)
        else:
            return False
        # a merge or split may have changed atoms still pending on either side
        a, b = resolve(a[::-1])[::-1], resolve(b[::-1])[::-1]
    return True


# (node, name of a factor), or (node, index of a result, dimension)
Place = tuple[Any, ...]


@dataclass(frozen=True)
class Link:
    """A factor of ``node``'s rule and a tensor dimension on which its extent differs, as atoms; and their places."""

    factor: tuple[Atom, ...]
    dim: tuple[Atom, ...]
    resize: Resize
    node: fx.Node
    places: tuple[Place, Place]

    @property
    def ends(self) -> tuple[list[Atom], list[Atom]]:
        return resolve(list(self.factor)), resolve(list(self.dim))


def _divides(rule: OpRule) -> bool:
    """Whether a dimension is a product of several factors."""
    return any(len(factors) > 1 for _, _, dims in rule.tensors() for factors in dims)


class Axes:
    """The axes of a graph whose nodes carry rules.

    Args:
        graph: every node annotated with its rule, if it has one.
        divide: returns the partition of a sequence axis of a given size.
        sequence_dims: input name -> its sequence dimension, for graphs whose ops do not show it.
        ignored: nodes whose links do not affect ownership (their values are replicated anyway).
    """

    def __init__(
        self,
        graph: fx.Graph,
        divide: Callable[[Size], Partition],
        sequence_dims: Mapping[str, int],
        ignored: frozenset[fx.Node] = frozenset(),
    ) -> None:
        self.divide = divide
        self._ignored = ignored
        whole: set[Place] = set()
        self._infer(graph, sequence_dims, whole)
        while torn := set(self._torn()) - whole:
            whole |= torn
            self._infer(graph, sequence_dims, whole)
        # it may be decided only now that ranks get blocks in order
        self._partitions.clear()
        self._granules.clear()

    def _infer(self, graph: fx.Graph, sequence_dims: Mapping[str, int], whole: Collection[Place]) -> None:
        """Unify all that rules equate; what is at ``whole`` stays one atom."""
        self._whole = whole
        self._dims: dict[tuple[fx.Node, int], list[list[Atom]]] = {}
        self._factors: dict[fx.Node, dict[str, list[Atom]]] = {}
        self.links: list[Link] = []
        self._sequences: list[Atom] = []
        self._partitions: dict[Atom, Partition] = {}
        self._granules: dict[Atom, int] = {}
        for node in graph.nodes:
            picked = dataflow.projection(node)
            if picked is not None:
                self._dims[node, 0] = self._dims[picked]
                continue
            for index, shape in enumerate(dataflow.shapes(node)):
                self._dims[node, index] = [
                    atoms_of(size, (node, index, dim) in whole) for dim, size in enumerate(shape)
                ]
        rules = {node: rule for node in graph.nodes if (rule := notes.note(node).rule) is not None}
        # what divides dimensions comes last, when it is known which stay whole
        for node in sorted(rules, key=lambda node: _divides(rules[node])) if whole else rules:
            self._apply(node, rules[node])
        if whole:
            at = {node: position for position, node in enumerate(rules)}
            self.links.sort(key=lambda link: at[link.node])
        for node in graph.nodes:
            name = notes.note(node).input_name
            if name in sequence_dims:
                self._sequences.extend(self._dims[node, 0][sequence_dims[name]])
        self._family = self._close_over_links()

    def _torn(self) -> Iterator[Place]:
        """Where links lead from a sequence to what is several atoms, and ranks do not share the outermost of these."""
        for link, source, target in self._links():
            for one, other, place in ((source, target, link.places[1]), (target, source, link.places[0])):
                if len(other) > 1 and len(one) == 1 and one[0] in self._family:
                    if self._derived(link, source, target) != self.partition(target[0]):
                        yield place

    def _apply(self, node: fx.Node, rule: OpRule) -> None:
        factors = {name: atoms_of(size, (node, name) in self._whole) for name, size in rule.sizes.items()}
        self._factors[node] = factors
        operands = dataflow.operands(node)
        for side, index, dims in rule.tensors():
            owner = (operands[index], 0) if side == "operand" else (node, index)
            self._equate(node, rule, side, index, dims, self._dims.get(owner, []))
        for role in ("queries", "keys"):
            if role in rule.roles:
                self._sequences.extend(factors[rule.roles[role]])

    def _equate(
        self, node: fx.Node, rule: OpRule, side: str, index: int, dims: Dims, own: list[list[Atom]]
    ) -> None:
        for dim, (names, atoms) in enumerate(zip(dims, own, strict=True)):
            factors = [atom for name in names for atom in self._factors[node][name]]
            resized = [rule.resize[side, index, name] for name in names if (side, index, name) in rule.resize]
            if all(resize.halo for resize in resized):
                unify(atoms, factors)
            else:
                owner = (dataflow.operands(node)[index], 0) if side == "operand" else (node, index)
                owner = dataflow.projection(owner[0]) or owner
                places = (node, names[0]), (*owner, dim)
                self.links.append(Link(tuple(factors), tuple(atoms), resized[0], node, places))

    def _close_over_links(self) -> set[Atom]:
        family = set(resolve(self._sequences))
        links = [link.ends for link in self.links if link.resize.links]
        outer = [(source[0], target[0]) for source, target in links if source and target]
        grown = True
        while grown:
            grown = False
            for ends in outer:
                if not family.isdisjoint(ends) and not family.issuperset(ends):
                    family.update(ends)
                    grown = True
        return family

    def add_sequences(self, factors: Iterable[tuple[fx.Node, str]]) -> None:
        """Take factors of nodes for sequences."""
        self._sequences.extend(atom for node, name in factors for atom in self._factors[node][name])
        self._family = self._close_over_links()

    @property
    def has_sequence(self) -> bool:
        return bool(self._family)

    def is_sequence(self, atom: Atom) -> bool:
        return atom in self._family

    def is_whole_sequence(self, atoms: list[Atom]) -> bool:
        """Whether ``atoms`` are all of a sequence, and not a block of one."""
        wholes = [resolve([atom]) for atom in self._sequences]
        in_parts = {atom for whole in wholes if len(whole) > 1 for atom in whole}
        return atoms in wholes or (len(atoms) == 1 and atoms[0] in self._family - in_parts)

    def dims(self, node: fx.Node, index: int = 0) -> list[list[Atom]]:
        """Atoms of each dimension of a node's output."""
        return [resolve(atoms) for atoms in self._dims[node, index]]

    def factor(self, node: fx.Node, name: str) -> list[Atom]:
        """Atoms of one factor of the node's rule, outermost first."""
        return resolve(self._factors[node][name])

    def partition(self, atom: Atom) -> Partition:
        """Partition of a sequence axis: derived from an older axis if a link says so, else :meth:`_root`."""
        if atom not in self._partitions:
            derived = (
                self._derived(link, source, target)
                for link, source, target in self._links()
                if target[0] is atom and source[0].age < atom.age and source[0] in self._family
            )
            found = next(derived, None)
            self._partitions[atom] = self._root(atom) if found is None else found
        return self._partitions[atom]

    def _derived(self, link: Link, source: list[Atom], target: list[Atom]) -> Partition | None:
        """The partition of the outermost atom at the link's dimension, as its factor says; None if it has none."""
        return link.resize.partition(self.partition(source[0]).refine(_inner(source))).coarsen(_inner(target))

    def _root(self, atom: Atom) -> Partition:
        """``divide`` of the axis' size; where a padded or cut form of it is divided in blocks, of their number."""
        granule = self._granule(atom)
        if granule == 1:
            return self.divide(atom.size)
        if not isinstance(atom.size, int):
            raise SymbolicSizeError(f"cannot divide {atom.size} in blocks of {granule}")
        return self.divide(-(-atom.size // granule)).refine(granule).slice(0, atom.size)

    def _granule(self, atom: Atom) -> int:
        """How many consecutive indices of an axis should stay together: those of one block of an axis made from it."""
        if atom not in self._granules:
            younger = (
                _inner(target) * self._granule(target[0])
                for _, source, target in self._links()
                if source == [atom] and target[0].age > atom.age
            )
            self._granules[atom] = lcm(*(granule for granule in younger if isinstance(granule, int)))
        return self._granules[atom]

    def _links(self) -> Iterator[tuple[Link, list[Atom], list[Atom]]]:
        """Links with both ends, between axes that ranks share."""
        for link in self.links:
            if link.node not in self._ignored and link.resize.links:
                source, target = link.ends
                if source and target:
                    yield link, source, target


def _inner(atoms: list[Atom]) -> Size:
    """How many indices of a product of axes one index of its outermost axis has."""
    return prod(atom.size for atom in atoms[1:])
