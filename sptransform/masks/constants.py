"""What the graph computes from nothing but numbers, computed: where a leaf is uniform, or a position.

Positions reach a mask by many ways (aranges, indexing, offsets, a module's defaults for what the user did not pass).
What they are is seen in their values, not in the ops that made them; there are as many of them as tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sptransform.graph import dataflow
from sptransform.masks.expressions import KEYS, QUERIES, Leaf
from sptransform.op_rules.mask_ops import LIKE
from sptransform.rules.rule import map_nodes


@dataclass(frozen=True)
class Uniform:
    """All entries are ``value``, a tensor of one entry, without dimensions where the leaf has none."""

    value: Tensor


@dataclass(frozen=True)
class Position:
    """The entry at query or key (``place``) i is ``values[i]``, ``slope * i`` and a constant; ``slope`` is 1 or -1."""

    place: int
    slope: int
    values: Tensor


class Constants:
    """Values of the nodes of one graph that depend on no input.

    Args:
        max_entries: what is larger than this is not computed.
    """

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._values: dict[fx.Node, Any] = {}
        self._leaves: dict[Leaf, Uniform | Position | None] = {}

    def of_leaf(self, leaf: Leaf) -> Uniform | Position | None:
        """None where the leaf depends on an input, or is neither."""
        if leaf not in self._leaves:
            is_whole = leaf.has(QUERIES) and leaf.has(KEYS)
            value = None if is_whole else self.value(leaf.node)
            self._leaves[leaf] = None if value is None else _recognized(leaf, value)
        return self._leaves[leaf]

    def value(self, node: fx.Node) -> Any:
        """The node's value on the CPU; None where it depends on an input, on chance, or is too large."""
        if node not in self._values:
            self._values[node] = self._computed(node)
        return self._values[node]

    def _computed(self, node: fx.Node) -> Any:
        fakes = dataflow.values(node)
        if any(not isinstance(fake.numel(), int) or fake.numel() > self._max_entries for fake in fakes):
            return None
        if node.op == "get_attr":
            constant = getattr(node.graph.owning_module, node.target)
            return constant.detach().cpu() if type(constant) is Tensor else None
        if node.op != "call_function" or not fakes or _is_random(node.target) or dataflow.writes(node):
            return None
        likes = dataflow.operands(node)[:1] if node.target in LIKE else []
        values = {x: _shaped_like(x) if x in likes else self.value(x) for x in node.all_input_nodes}
        if any(value is None for value in values.values()):
            return None

        def put(x: Any) -> Any:
            if isinstance(x, fx.Node):
                return values[x]
            return torch.device("cpu") if isinstance(x, torch.device) else x

        args, kwargs = map_nodes((node.args, dict(node.kwargs)), put)
        try:
            with torch.no_grad():
                value = node.target(*args, **kwargs)
        except RuntimeError:  # the CPU lacks the op for this dtype
            return None
        return value if not isinstance(value, Tensor) or value.dtype == fakes[0].dtype else None


def _shaped_like(node: fx.Node) -> Tensor | None:
    """A tensor whose entries nobody reads; None for a shape that is not known."""
    like = dataflow.value(node)
    is_known = all(isinstance(size, int) for size in like.shape)
    return torch.empty((), dtype=like.dtype).expand(like.shape) if is_known else None


def _is_random(target: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


def _recognized(leaf: Leaf, value: Tensor) -> Uniform | Position | None:
    if value.numel() == 0:
        return None
    first = value.reshape(-1)[:1]
    if bool((value == first).all()):
        return Uniform(first if value.dim() else first[0])
    place = QUERIES if leaf.has(QUERIES) else KEYS
    if not leaf.has(place):
        return None
    rows = value.movedim(leaf.places.index(place), -1).flatten(0, -2) if value.dim() > 1 else value[None]
    return position(place, rows[0]) if bool((rows == rows[0]).all()) else None


def position(place: int, values: Tensor) -> Position | None:
    """The position that ``values`` are, one for each query or key; None where they are none."""
    if values.dtype == torch.bool or values.is_complex() or len(values) < 2:
        return None
    exact = values.double()
    # differences of whole numbers that the dtype can count are exact; of others they may be rounded, each its own way
    if values.is_floating_point():
        if not bool((exact == exact.round()).all()) or bool((exact.abs() > 1 / torch.finfo(values.dtype).eps).any()):
            return None
    steps = exact.diff()
    slope = int(steps[0])
    return Position(place, slope, values) if slope in (1, -1) and bool((steps == slope).all()) else None
