"""Axis inference: which tensor dimensions of a graph are the same logical axis, by unifying what the rules equate.

Every dimension is a product of atoms. A rule that names one factor on two dimensions unifies their atoms; a reshape
splits an atom into several. A slice or a pad *links* two atoms: another extent of the same axis. The sequence is then
whatever is unified with, or linked to, the query or key factor of an attention op. Op-agnostic.

A link is of single atoms. Where it leads from a sequence to a dimension that a reshape elsewhere divides (the tokens of
an image, joined with text, then laid out as rows), the dimension is kept whole, and the reshape shares no axis.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from sptransform.graph import dataflow, notes
from sptransform.rules.rule import Dims, OpRule, Resize
from sptransform.sharding.partition import Partition
from sptransform.sharding.sizes import Size, quotient


class Atom:
    """An axis not yet divided; ``merged`` or ``parts`` is set once it is merged or divided. ``whole``: it never is."""

    __slots__ = ("merged", "parts", "size", "whole")

    def __init__(self, size: Size, whole: bool = False) -> None:
        self.size = size
        self.whole = whole
        self.merged: Atom | None = None
        self.parts: tuple[Atom, ...] | None = None


def atoms_of(size: Size, whole: bool = False) -> list[Atom]:
    """A dimension or factor of this size as atoms: one, or none if the size is 1."""
    return [Atom(size, whole)] if size != 1 else []


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
            x.whole = x.whole or y.whole
        elif not x.whole and (rest := quotient(x.size, y.size)) is not None:
            x.parts = (Atom(y.size), Atom(rest))
            a.extend(resolve([x])[::-1])
            b.append(y)
        elif not y.whole and (rest := quotient(y.size, x.size)) is not None:
            y.parts = (Atom(x.size), Atom(rest))
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
        self._partitions: dict[Atom, Partition] = {}

    def _infer(self, graph: fx.Graph, sequence_dims: Mapping[str, int], whole: Collection[Place]) -> None:
        """Unify all that rules equate; what is at ``whole`` stays one atom."""
        self._whole = whole
        self._dims: dict[tuple[fx.Node, int], list[list[Atom]]] = {}
        self._factors: dict[fx.Node, dict[str, list[Atom]]] = {}
        self.links: list[Link] = []
        self._sequences: list[Atom] = []
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
        """Where links lead from a sequence to what is several atoms."""
        for link in self.links:
            for one, other, place in zip(link.ends, link.ends[::-1], link.places[::-1], strict=True):
                if link.resize.links and len(other) > 1 and len(one) == 1 and one[0] in self._family:
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
            if not resized:
                unify(atoms, factors)
            else:
                owner = (dataflow.operands(node)[index], 0) if side == "operand" else (node, index)
                owner = dataflow.projection(owner[0]) or owner
                places = (node, names[0]), (*owner, dim)
                self.links.append(Link(tuple(factors), tuple(atoms), resized[0], node, places))

    def _close_over_links(self) -> set[Atom]:
        family = set(resolve(self._sequences))
        links = [link.ends for link in self.links if link.resize.links]
        grown = True
        while grown:
            grown = False
            for source, target in links:
                inside = [not family.isdisjoint(end) for end in (source, target)]
                if len(source) == len(target) == 1 and any(inside) and not all(inside):
                    family.update(source, target)
                    grown = True
        return family

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
        """Partition of a sequence axis: derived from another axis if a link says so, else ``divide`` of its size."""
        if atom not in self._partitions:
            self._partitions[atom] = self.divide(atom.size)
            for link in self.links:
                if link.node in self._ignored or not link.resize.links:
                    continue
                source, target = link.ends
                if target == [atom] and len(source) == 1 and source != target:
                    self._partitions[atom] = link.resize.partition(self.partition(source[0]))
                    break
        return self._partitions[atom]
