"""Sharding rules: one op's dimensions as factors, written like einsum.

A rule names the *factors* of an op (Shardy's word): independent iteration spaces. ``"i k, k j -> i j"`` says that
output row ``i`` needs only operand row ``i``; a factor that leaves the output is either summed (``reduce``: sharding
it gives a pending sum) or must stay replicated. A dimension may be a product of factors: ``"b s v -> (b s) v"``.
Algorithms read :class:`OpRule`; nothing here knows an op's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch.utils import _pytree as pytree

from sptransform.diagnostics.errors import RuleError
from sptransform.sharding.partition import Partition
from sptransform.sharding.sizes import Size, SymbolicSizeError

Dims = tuple[tuple[str, ...], ...]
Shape = tuple[Size, ...]


@dataclass(frozen=True)
class Operand:
    """Stands for the index-th tensor argument in an :class:`OpCall`."""

    index: int


@dataclass(frozen=True)
class OpCall:
    """One application of an op: its arguments with tensors replaced by :class:`Operand`, all global shapes, and
    the operands' dtypes.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    operand_shapes: tuple[Shape, ...]
    result_shapes: tuple[Shape, ...]
    operand_dtypes: tuple[torch.dtype, ...] = ()

    def argument(self, name: str) -> Any:
        """The argument called ``name`` in the op's schema; its default if it was not given."""
        if name in self.kwargs:
            return self.kwargs[name]
        for position, argument in enumerate(self.target._schema.arguments):
            if argument.name == name:
                if position < len(self.args) and not argument.kwarg_only:
                    return self.args[position]
                return argument.default_value
        raise RuleError(f"{self.target} has no argument {name!r}")

    def operand(self, name: str) -> int | None:
        """Index of the tensor argument called ``name``; None if it was not given."""
        value = self.argument(name)
        return value.index if isinstance(value, Operand) else None


def map_nodes(tree: Any, fn: Callable[[Any], Any]) -> Any:
    """``tree`` with ``fn`` applied to its leaves, left to right."""
    return pytree.tree_map(fn, tree)


@dataclass(frozen=True)
class Resize:
    """For a tensor on which a factor has another extent: maps the factor's partition to that tensor.

    ``links``: it is still the same axis (a slice of it), so if one is a sequence, both are. ``start``: the tensor has
    consecutive indices of the factor, beginning at ``start``. ``halo``: the tensor has all of the factor; the partition
    is of the indices that a rank reads, and ranks may read the same one. ``padded``: the tensor has more or fewer
    indices at the ends, which the owners of these add or cut.
    """

    partition: Callable[[Partition], Partition]
    links: bool = True
    start: Size | None = None
    halo: bool = False
    padded: bool = False

    def is_alike(self, partition: Partition) -> bool:
        """Whether ranks that have equal shares of both extents do the same to theirs, wherever these begin and end."""
        if partition.num_ranks == 1:
            return True
        if self.halo or self.padded or self.partition(partition).is_overlapping:
            return False
        return self.start is None or partition.slice(0, self.start).is_even


@dataclass(frozen=True)
class OpRule:
    """A rule applied to one call.

    Attributes:
        operands, results: factors of every dimension; a dimension of size 1 has none.
        sizes: extent of every factor.
        reduce: factors summed over; sharding one gives a pending sum.
        replicated: factors that cannot be sharded.
        ring_factors: those of ``replicated`` whose parts the op itself can pass around a ring of ranks (keys).
        self_reduced: those of ``replicated`` along which the op still runs on shards, because it combines them itself.
            Results without the factor are then whole on every rank, and so are their gradients.
        is_causal: for attention ops: later queries see more keys.
        linear: sets of operands in which the op is jointly linear: a pending sum passes through them.
        resize: (side, tensor index, factor) -> :class:`Resize`; side is "operand" or "result".
        ordered: factors along which every entry depends on its neighbours or on all entries before it: a sequence, if
            nothing else says what is one. Those of ``self_reduced`` can only be cut in blocks, in the order of ranks.
        windowed: the first of several dimensions that windows move along, as in an image: a sequence, if nothing is
            ordered either.
        looked_up: the last dimension of the indices that a table is read at: a sequence, if no windows move either.
        roles: for attention ops: "heads", "queries", "keys", "batch" -> factor. Strategies place by role.
        unrepeatable: running the op again gives another result, because it draws random numbers.
        own: results that differ per rank and that only the op's backward reads (a seed); they have no factors.
        unread: operands of which only metadata is read (shape, dtype, device); they may have any placement.
        placements: cache of each tensor's shard under each decision; see ``Cut.shard``.
        heavy: worth sharding even where every operand is replicated anyway (a contraction, a large table).
        whole_gradient: the op's backward is not linear in the gradients it gets: these must not be pending sums.
    """

    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    sizes: Mapping[str, Size]
    reduce: frozenset[str] = frozenset()
    replicated: frozenset[str] = frozenset()
    ring_factors: frozenset[str] = frozenset()
    self_reduced: frozenset[str] = frozenset()
    is_causal: bool = False
    linear: tuple[frozenset[int], ...] = ()
    resize: Mapping[tuple[str, int, str], Resize] = field(default_factory=dict)
    ordered: frozenset[str] = frozenset()
    windowed: frozenset[str] = frozenset()
    looked_up: frozenset[str] = frozenset()
    roles: Mapping[str, str] = field(default_factory=dict)
    unrepeatable: bool = False
    own: frozenset[int] = frozenset()
    unread: frozenset[int] = frozenset()
    heavy: bool = False
    whole_gradient: bool = False
    placements: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def has_sequence(self) -> bool:
        """An attention op with more than one query: there is something to split."""
        return "queries" in self.roles

    def tensors(self) -> Iterator[tuple[str, int, Dims]]:
        """Every tensor of the op with its side and index."""
        for index, dims in enumerate(self.operands):
            yield "operand", index, dims
        for index, dims in enumerate(self.results):
            yield "result", index, dims

    def check(self, call: OpCall) -> OpRule:
        """Return self.

        Raises:
            RuleError: factors and shapes disagree.
            SymbolicSizeError: they may disagree, depending on lengths.
        """
        shapes = {"operand": call.operand_shapes, "result": call.result_shapes}
        if len(self.operands) != len(call.operand_shapes) or len(self.results) != len(call.result_shapes):
            found = f"{len(self.operands)} operands and {len(self.results)} results"
            raise RuleError(f"{call.target}: the rule has {found}")
        for side, index, dims in self.tensors():
            shape = shapes[side][index]
            if len(dims) != len(shape):
                raise RuleError(f"{call.target}: {side} {index} has {len(shape)} dims, its rule {len(dims)}")
            for dim, factors in enumerate(dims):
                if any((side, index, f) in self.resize for f in factors):
                    continue
                size = prod(self.sizes[f] for f in factors)
                if size != shape[dim]:
                    if not isinstance(size, int) or not isinstance(shape[dim], int):
                        raise SymbolicSizeError(f"{size} and {shape[dim]} are not known to be one size")
                    raise RuleError(f"{call.target}: dim {dim} of {side} {index} is {shape[dim]}, not {factors}")
        shared = [dims for index, dims in enumerate(self.results) if index not in self.own]
        kept = [{f for factors in dims for f in factors} for dims in shared]
        read = {f for dims in self.operands for factors in dims for f in factors}
        lost = {f for f in read if not all(f in own for own in kept)} - self.reduce - self.replicated
        if lost:
            names = ", ".join(sorted(lost))
            raise RuleError(f"{call.target}: {names} leaves a result, and is in neither reduce nor replicated")
        return self


RuleFn = Callable[[OpCall], OpRule | None]
