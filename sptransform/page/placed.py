"""What each rank has of the tensors of an attention, around it and in it, as index ranges of the whole tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from torch import fx

from sptransform.compiler.rewrite import Rewritten
from sptransform.graph import dataflow, notes
from sptransform.rules.decision import Decision
from sptransform.rules.rule import OpRule
from sptransform.sharding.intervals import Intervals
from sptransform.sharding.placement import Placement, Shard

# of the first operands, and of the first result, of every op with roles
_NAMES = ("query", "key", "value")
Box = tuple[Intervals, ...]  # the index ranges of each dim


@dataclass(frozen=True)
class Placed:
    """One tensor at one place.

    Attributes:
        name: "query", "key", "value" or "output".
        place: "around", as the model's other ops have it, or "in" the attention.
        shape: of the whole tensor, as [batch, heads, tokens, size of a head].
        placements: on each mesh dim, as printed.
        boxes: for each of ``ranks``, what it has.
        ranks: those that are drawn.
    """

    name: str
    place: str
    shape: tuple[int, ...]
    placements: tuple[str, ...]
    boxes: tuple[Box, ...]
    ranks: tuple[int, ...]


def placed(rewritten: Rewritten, node: fx.Node, ranks: Sequence[int]) -> Iterator[Placed]:
    """The operands and the result of the attention ``node``, around it and in it, if all sizes are known."""
    decided = notes.decided(node)
    parts = rewritten.context.result.mesh_dims
    sizes = [part.mesh.size for part in parts]
    operands = dataflow.operands(node)[: len(_NAMES)]
    for name, index, found in (
        *((name, at, _arriving(x)) for at, (name, x) in enumerate(zip(_NAMES, operands, strict=False))),
        ("output", None, _leaving(node)),
    ):
        inner = [_of_node(rule, decision, index) for rule, decision in decided]
        outer = [found.get(part.mesh.group, own) for part, own in zip(parts, inner, strict=True)]
        shape = _shape(decided[0][0], index)
        if len(shape) == 4 and all(isinstance(size, int) for size in shape):
            for place, placements in (("around", outer), ("in", inner)):
                boxes = tuple(_box(shape, placements, sizes, rank) for rank in ranks)
                yield Placed(name, place, shape, tuple(map(str, placements)), boxes, tuple(ranks))


def _of_node(rule: OpRule, decision: Decision, index: int | None) -> Placement:
    return decision.outcome(rule, 0) if index is None else decision.demand(rule, index)


def _shape(rule: OpRule, index: int | None) -> tuple[int, ...]:
    """Of the whole tensor: the rule of the first mesh dim has whole sizes."""
    dims = rule.results[0] if index is None else rule.operands[index]
    return tuple(prod(rule.sizes[factor] for factor in factors) for factors in dims)


def _arriving(node: fx.Node) -> dict[str, Placement]:
    """Where the operand comes from, by the group that moves it: its placement before that move."""
    found: dict[str, Placement] = {}
    while True:
        picked = dataflow.projection(node)
        move, index = picked if picked is not None else (node, 0)
        note = notes.note(move)
        if not note.transitions or note.mesh is None:
            return found
        found.setdefault(note.mesh.group, note.transitions[index][0])
        node = dataflow.operands(move)[index]


def _leaving(node: fx.Node) -> dict[str, Placement]:
    """Where the result goes, by the group that moves it: its placement after that move."""
    found: dict[str, Placement] = {}
    for reader in node.users:
        note, picked = notes.note(reader), dataflow.projection(reader)
        if note.transitions and note.mesh is not None:
            at = dataflow.operands(reader).index(node)
            found.setdefault(note.mesh.group, note.transitions[at][1])
        elif picked is not None and picked[1] == 0:
            found |= _leaving(reader)
    return found


def _box(shape: tuple[int, ...], placements: Sequence[Placement], sizes: Sequence[int], rank: int) -> Box:
    """A later mesh dim cuts what the rank stores under the earlier ones."""
    box = [((0, size),) for size in shape]
    at = list(product(*map(range, sizes)))[rank]
    for placement, own in zip(placements, at, strict=True):
        if isinstance(placement, Shard):
            stored = placement.partition.tiled(placement.outer).owned[own]
            box[placement.dim] = tuple(piece for lo, hi in stored for piece in stored_at(box[placement.dim], lo, hi))
    return tuple(box)


def stored_at(own: Intervals, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The indices that the owner of ``own`` stores at offsets ``start .. stop - 1``."""
    at = 0
    for lo, hi in own:
        first, last = max(start - at, 0), min(stop - at, hi - lo)
        if first < last:
            yield lo + first, lo + last
        at += hi - lo
