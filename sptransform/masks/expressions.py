"""A mask as an expression: pointwise ops over leaves, which are graph tensors placed in the shape of the scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sptransform.graph import dataflow, notes
from sptransform.ops.mask_program import MaskProgram, Ref, Step

HEADS, QUERIES, KEYS = -3, -2, -1

# Of a table, the place of the dimension in which is looked up: the scores have none such
ENTRIES = 0

# For each dimension of a tensor, its dimension in the scores, counted from the right; None only where the size is 1
Places = tuple[int | None, ...]


@dataclass(frozen=True, eq=False)
class Leaf:
    """A tensor of the graph. ``reader`` is the node that reads it, or the tensor's own node if it is the mask.

    ``detached``: though it has a gradient, none comes from here.
    """

    node: fx.Node
    places: Places
    reader: fx.Node = field(repr=False)
    detached: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return dataflow.value(self.node).dtype

    @property
    def broadcasts(self) -> bool:
        """Whether its dimensions are where broadcasting puts them."""
        return self.places == from_the_right(len(self.places))

    @property
    def is_table(self) -> bool:
        return ENTRIES in self.places

    @property
    def trained(self) -> bool:
        """Whether it gets a gradient from the mask."""
        return bool(notes.note(self.node).differentiable) and not self.detached

    def has(self, place: int) -> bool:
        """Whether it has the dimension ``place`` (queries or keys), with a size other than 1."""
        return has(self.node, self.places, place)


@dataclass(frozen=True, eq=False)
class Apply:
    """A pointwise op; ``args`` and ``kwargs`` hold expressions, numbers and dtypes."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: torch.dtype

    @property
    def operands(self) -> list[Expression]:
        return [x for x in (*self.args, *self.kwargs.values()) if isinstance(x, Leaf | Apply)]


Expression = Leaf | Apply


def has(node: fx.Node, places: Places, place: int) -> bool:
    return any(p == place and size != 1 for p, size in zip(places, dataflow.shape(node), strict=True))


def from_the_right(ndim: int) -> Places:
    """The places at which a tensor of ``ndim`` dimensions broadcasts."""
    return tuple(range(-ndim, 0))


def parts_of(root: Expression) -> Iterator[Expression]:
    """The expression and its parts, each once, operands before their readers."""
    done: set[Expression] = set()
    stack = [(root, False)]
    while stack:
        part, is_ready = stack.pop()
        if part in done:
            continue
        if is_ready or isinstance(part, Leaf):
            done.add(part)
            yield part
        else:
            stack.append((part, True))
            stack.extend((operand, False) for operand in reversed(part.operands))


@dataclass(frozen=True)
class Program:
    """A program and its operands."""

    text: MaskProgram
    rows: list[Leaf]
    columns: list[Leaf]
    tables: list[Leaf]

    @property
    def trained(self) -> list[int]:
        """Indices of the operands that get a gradient."""
        return [i for i, leaf in enumerate([*self.rows, *self.columns, *self.tables]) if leaf.trained]


def program_of(root: Expression) -> Program:
    """The program of an expression."""
    parts = list(parts_of(root))
    leaves = [part for part in parts if isinstance(part, Leaf)]
    tables = [leaf for leaf in leaves if leaf.is_table]
    rows = [leaf for leaf in leaves if leaf.has(QUERIES)]
    columns = [leaf for leaf in leaves if not leaf.has(QUERIES) and not leaf.is_table]
    index = {leaf: Ref(i) for i, leaf in enumerate([*rows, *columns, *tables])}
    steps = []

    def written(x: Any) -> Any:
        return index[x] if isinstance(x, Leaf | Apply) else x

    for part in parts:
        if isinstance(part, Apply):
            kwargs = tuple((key, written(x)) for key, x in sorted(part.kwargs.items()))
            steps.append(Step(part.target, tuple(map(written, part.args)), kwargs))
            index[part] = Ref(len(index))
    return Program(MaskProgram(len(leaves), tuple(steps)), rows, columns, tables)
