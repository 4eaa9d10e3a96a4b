"""Inner axes: the axes that tensor parallelism cuts, inferred from how linears follow one another. Op-agnostic.

A linear contracts a computed tensor with a parameter. It leads from the axis it contracts to the axis it makes; a table
lookup leads from the table's rows. Axes are of two kinds, and a linear leads from one kind to the other: the *stream*
(the hidden axis of the residual stream), which is never cut, and *inner* axes, which are cut. The heads of attention
are inner; everything else follows from them:

- the other end of a linear with an inner end is stream;
- the other end of a linear with a stream end is inner, unless an op needs it uncut (a norm does).

A slice or piece of an inner axis is inner, and so is the axis that an inner axis is a piece of (a fused projection).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from sptransform.engine.axes import Atom, Axes, Link
from sptransform.graph import dataflow, notes
from sptransform.rules.rule import OpRule
from sptransform.sharding.partition import Partition
from sptransform.sharding.sizes import Size

Linear = tuple[list[Atom], list[Atom]]


class InnerAxes:
    """The inner axes of a graph whose nodes carry rules, and the partition of each.

    Args:
        graph: every node annotated with its rule, if it has one.
        axes: its axes.
        num_ranks: number of ranks that inner axes are cut over.
        light: see :func:`sptransform.engine.propagation.light_nodes`.
    """

    def __init__(self, graph: fx.Graph, axes: Axes, num_ranks: int, light: frozenset[fx.Node]) -> None:
        self._axes = axes
        self._num_ranks = num_ranks
        self._partitions: dict[Atom, Partition | None] = {}
        self._inner: set[Atom] = set()
        self._heads: set[Atom] = set()
        self._uncut = self._needed_in_full(graph, light)
        for node in graph.nodes:
            rule = notes.note(node).rule
            if rule is not None and "heads" in rule.roles:
                self._heads.update(axes.factor(node, rule.roles["heads"])[:1])
        self._add(self._heads)
        self._colour(list(self._linears(graph, light)))

    def __contains__(self, atom: Atom) -> bool:
        return atom in self._inner

    def _needed_in_full(self, graph: fx.Graph, light: frozenset[fx.Node]) -> set[Atom]:
        """Axes that some op needs uncut. Ops that only pick indices (argmax) may gather, so they do not count."""
        found: set[Atom] = set()
        for node in graph.nodes:
            rule = notes.note(node).rule
            if rule is not None and node not in light and dataflow.values(node)[0].is_floating_point():
                for factor in rule.replicated - rule.self_reduced:
                    if factor in rule.sizes:
                        found.update(self._axes.factor(node, factor))
        return found

    def _linears(self, graph: fx.Graph, light: frozenset[fx.Node]) -> Iterator[Linear]:
        """(contracted axis, made axis) of every contraction with a parameter."""
        of_parameters: set[fx.Node] = set()
        for node in graph.nodes:
            inputs = node.all_input_nodes
            if notes.note(node).is_parameter or (node in light and inputs and of_parameters.issuperset(inputs)):
                of_parameters.add(node)
            rule = notes.note(node).rule
            if rule is None or not rule.heavy or rule.roles:
                continue
            weights = [i for i, x in enumerate(dataflow.operands(node)) if x in of_parameters]
            ends = [[self._atoms(node, factors) for factors in _ends(rule, weight)] for weight in weights]
            ends = [pair for pair in ends if all(pair)]  # a bias has one end
            if len(ends) == 1:
                yield ends[0][0], ends[0][1]

    def _atoms(self, node: fx.Node, factors: list[str]) -> list[Atom]:
        return [atom for factor in factors for atom in self._axes.factor(node, factor)]

    def _colour(self, linears: list[Linear]) -> None:
        stream: set[Atom] = set()
        ends = [each for pair in linears for each in (pair, pair[::-1])]
        for is_sure in (True, False):  # all that heads make stream, before anything that may be inner is
            grown = -1
            while grown != len(stream) + len(self._inner):
                grown = len(stream) + len(self._inner)
                for own, other in ends:
                    if not self._inner.isdisjoint(own) and self._inner.isdisjoint(other):
                        stream.update(other)
                    elif is_sure or stream.isdisjoint(own):
                        continue
                    elif stream.isdisjoint(other) and self._inner.isdisjoint(other):
                        self._try(other[0], stream)

    def _try(self, atom: Atom, stream: set[Atom]) -> None:
        """Cut ``atom`` and its kin (see :meth:`_kin`), if all of them may be cut."""
        family = self._kin({atom})
        usable = stream.isdisjoint(family) and self._uncut.isdisjoint(family)
        if usable and not any(self._axes.is_sequence(kin) or kin.size < self._num_ranks for kin in family):
            self._add(family)

    def _add(self, atoms: set[Atom]) -> None:
        self._inner |= self._kin(atoms)
        self._partitions.clear()

    def _kin(self, atoms: set[Atom]) -> set[Atom]:
        """``atoms``, and all atoms linked to them by resized dimensions, directly or not."""
        found = set(atoms)
        grown = 0
        while grown != len(found):
            grown = len(found)
            for link in self._axes.links:
                factor, dim = link.ends
                if factor and dim and len(factor) == 1 and (factor[0] in found or dim[0] in found):
                    found.update((factor[0], dim[0]))
        return found

    def partition(self, atom: Atom) -> Partition:
        """Partition of an inner axis: composed of its pieces' partitions, or derived by an op from another axis.

        Otherwise contiguous; balanced for heads, and where a contiguous cut would leave a rank empty.
        """
        if atom not in self._partitions:
            self._partitions[atom] = None  # recursion guard: ignore derivations back from this axis
            pieces = [link for link in self._axes.links if link.resize.start is not None and link.ends[0] == [atom]]
            derived = [link for link in self._axes.links if link.resize.start is None and link.ends[1] == [atom]]
            found = self._composed(atom, pieces)
            for link in derived if found is None else ():
                factor, _ = link.ends
                if len(factor) == 1 and factor[0] in self._inner and self._partitions.get(factor[0], True) is not None:
                    found = link.resize.partition(self.partition(factor[0]))
                    break
            self._partitions[atom] = self._divided(atom) if found is None else found
        return self._partitions[atom] or self._divided(atom)

    def _composed(self, atom: Atom, pieces: list[Link]) -> Partition | None:
        """The joined partitions of all pieces, if these cover the axis without gap or overlap; else None."""
        owned: list[list[tuple[Size, Size]]] = [[] for _ in range(self._num_ranks)]
        end: Size = 0
        for link in sorted({link.resize.start: link for link in pieces}.values(), key=lambda link: link.resize.start):
            _, (first, *rest) = link.ends
            if link.resize.start != end or first not in self._inner:
                return None
            part = self.partition(first)
            for inside in rest:
                part = part.refine(inside.size)
            for rank, own in enumerate(part.owned):
                owned[rank].extend((lo + end, hi + end) for lo, hi in own)
            end += part.size
        return Partition.of(atom.size, owned) if end == atom.size else None

    def _divided(self, atom: Atom) -> Partition:
        contiguous = Partition.contiguous(atom.size, self._num_ranks)
        is_fair = atom not in self._heads and min(contiguous.local_sizes) > 0
        return contiguous if is_fair else Partition.balanced(atom.size, self._num_ranks)


def _ends(rule: OpRule, weight: int) -> tuple[list[str], list[str]]:
    """The weight's factors that the op contracts, and those that what it is multiplied with does not have.

    The latter are in the result, or the op reduces them again, by itself.
    """
    results = {f for dims in rule.results for factors in dims for f in factors} | rule.self_reduced
    own, *others = (
        [factor for factors in dims for factor in factors]
        for dims in (rule.operands[weight], *rule.operands[:weight], *rule.operands[weight + 1 :])
    )
    contracted = [f for f in own if f not in results]
    multiplied = {f for factors in others if not set(contracted).isdisjoint(factors) for f in factors}
    return contracted, [f for f in own if f in results and f not in multiplied]
