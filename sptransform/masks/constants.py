"""Evaluates nodes that depend on no input, to find leaves that are uniform or positions.

Positions reach a mask in many ways (aranges, indexing, offsets, a module's defaults for what the user did not pass).
They are recognised by their values, not by the ops that made them. There are only as many values as tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sptransform.graph import dataflow
from sptransform.graph.reruns import arguments_on_cpu
from sptransform.masks.closed_forms import ClosedForms, constant_of
from sptransform.masks.expressions import KEYS, QUERIES, Apply, Expression, Leaf, parts_of
from sptransform.op_rules.mask_ops import LIKE


@dataclass(frozen=True)
class Uniform:
    """All entries equal ``value``, a 1-D tensor of one entry, or a 0-D one if the leaf is 0-D."""

    value: Tensor


@dataclass(frozen=True)
class Position:
    """The entry at query or key (``place``) i is ``values[i] == slope * i + constant``; ``slope`` is 1 or -1."""

    place: int
    slope: int
    values: Tensor


class Constants:
    """Values of the nodes of one graph that depend on no input.

    Args:
        max_entries: tensors with more entries are not computed.
        forms: of tensors of an open length, which have no value.
    """

    def __init__(self, max_entries: int, forms: ClosedForms) -> None:
        self._max_entries = max_entries
        self.forms = forms
        self._values: dict[fx.Node, Any] = {}
        self._leaves: dict[Leaf, Uniform | Position | None] = {}

    def of_leaf(self, leaf: Leaf) -> Uniform | Position | None:
        """None if the leaf depends on an input, is a table, or is neither uniform nor a position."""
        if leaf not in self._leaves:
            self._leaves[leaf] = None if leaf.is_table else self._found(leaf)
        return self._leaves[leaf]

    def _found(self, leaf: Leaf) -> Uniform | Position | None:
        is_whole = leaf.has(QUERIES) and leaf.has(KEYS)
        value = None if is_whole else self.value(leaf.node)
        return self._formula(leaf) if value is None else _recognized(leaf, value)

    def _formula(self, leaf: Leaf) -> Uniform | None:
        number = constant_of(self.forms.of(leaf.node))
        if number is None:
            return None
        return Uniform(torch.tensor([number] if leaf.places else number, dtype=leaf.dtype))

    def cover(self, part: Expression) -> bool:
        """Whether all leaves of the part are uniform."""
        leaves = (x for x in parts_of(part) if isinstance(x, Leaf))
        return all(isinstance(self.of_leaf(leaf), Uniform) for leaf in leaves)

    def computed(self, part: Expression, given: dict[Expression, Tensor]) -> Tensor:
        """The value of ``part``; ``given`` holds the values of its parts that are not uniform."""
        values: dict[Expression, Tensor] = dict(given)

        def put(x: Any) -> Any:
            return values[x] if isinstance(x, Leaf | Apply) else x

        for current in parts_of(part):
            if current in values:
                continue
            if isinstance(current, Leaf):
                constant = self.of_leaf(current)
                if isinstance(constant, Uniform):
                    values[current] = constant.value
            elif all(x in values for x in current.operands):
                kwargs = {key: put(x) for key, x in current.kwargs.items()}
                values[current] = current.target(*map(put, current.args), **kwargs)
        return values[part]

    def value(self, node: fx.Node) -> Any:
        """The node's value on the CPU; None if it depends on an input or on random numbers, or is too large."""
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
        args, kwargs = arguments_on_cpu(node, values)
        try:
            with torch.no_grad():
                value = node.target(*args, **kwargs)
        except RuntimeError:  # the CPU lacks the op for this dtype
            return None
        return value if not isinstance(value, Tensor) or value.dtype == fakes[0].dtype else None


def _shaped_like(node: fx.Node) -> Tensor | None:
    """A tensor of the node's shape, whose entries are never read; None for a symbolic shape."""
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
    """``values``, one per query or key, as a position; None if they do not rise or fall in steps of 1."""
    if values.dtype == torch.bool or values.is_complex() or len(values) < 2:
        return None
    exact = values.double()
    # differences are exact only for integers that the dtype can count; others may be rounded, each differently
    if values.is_floating_point():
        if not bool((exact == exact.round()).all()) or bool((exact.abs() > 1 / torch.finfo(values.dtype).eps).any()):
            return None
    steps = exact.diff()
    slope = int(steps[0])
    return Position(place, slope, values) if slope in (1, -1) and bool((steps == slope).all()) else None
