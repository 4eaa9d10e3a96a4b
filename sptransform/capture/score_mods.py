"""Functions of one score, as flex_attention takes them, read as functions of all scores at once.

Dynamo's graph of a ``mask_mod`` or a ``score_mod`` computes with scalars, the indices of one score::

    %document = getitem(%captured, (%b, %q_idx));  %seen = ge(%q_idx, %kv_idx)

Run with indices that broadcast to the scores, as ``arange(queries).view(1, 1, queries, 1)``, pointwise ops and
lookups give what they give for each score alone. Any other op of indices is refused. Of the score itself only what
attention can do is known: a factor, a softcap, something added, -inf in places.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch
from torch import Tensor, fx

from sptransform.diagnostics.errors import CaptureError, describe
from sptransform.op_rules.mask_ops import is_pointwise_function

_FIX = "pointwise ops and lookups by index, on the score a factor, a softcap, an added bias, torch.where with -inf"


@dataclass(frozen=True)
class Scores:
    """What became of scores s: ``factor * s``, or ``height * tanh(factor * s)``; plus ``bias``; -inf if ``hidden``."""

    factor: float = 1.0
    height: float | None = None
    bias: Tensor | None = None
    hidden: Tensor | None = None

    def after(self, name: str, args: Sequence[Any]) -> Scores | None:
        """The scores after an op of this name that has them among its arguments; None if they are no longer any."""
        if name in ("where", "masked_fill"):
            return self._filled(*(args if name == "where" else (args[1], args[2], args[0])))
        first, *others = args
        if name == "tanh" and self.height is None and self.bias is None and self.hidden is None:
            return replace(self, height=1.0)
        if name == "add" and len(others) == 1:
            return self._plus(others[0] if first is self else first)
        if len(others) != 1 or (name != "mul" and first is not self):
            return None
        other = others[0] if first is self else first
        if name == "sub" and isinstance(other, Tensor | int | float):
            return self._plus(-other)
        if name in ("mul", "div") and isinstance(other, int | float) and self.bias is None:
            number = other if name == "mul" else 1.0 / other
            if number > 0:  # else what is hidden would be the largest score
                return self._times(number)
        return None

    def _times(self, number: float) -> Scores:
        if self.height is None:
            return replace(self, factor=self.factor * number)
        return replace(self, height=self.height * number)

    def _plus(self, other: Any) -> Scores | None:
        if isinstance(other, Scores):
            return None
        if not isinstance(other, Tensor):
            other = torch.full((1, 1, 1, 1), other)
        return replace(self, bias=other if self.bias is None else self.bias + other)

    def _filled(self, condition: Any, taken: Any, other: Any) -> Scores | None:
        """``where(condition, taken, other)``."""
        fill = other if taken is self else taken
        if not isinstance(condition, Tensor) or not isinstance(fill, int | float) or fill != -inf:
            return None
        hidden = ~condition if taken is self else condition
        return replace(self, hidden=hidden if self.hidden is None else self.hidden | hidden)


class ScalarFunction(fx.Interpreter):
    """Runs a graph of scalars with indices that broadcast."""

    def of(self, scalars: Sequence[Any], captured: Sequence[Any]) -> Any:
        """The function of ``scalars``, the indices and perhaps :class:`Scores`, and of tensors that it captured.

        Raises:
            CaptureError: it is no such function.
        """
        self._scalars: set[fx.Node] = set(self.module.graph.find_nodes(op="placeholder")[: len(scalars)])
        return self.run(*scalars, *captured)

    def run_node(self, node: fx.Node) -> Any:
        if node.op in ("placeholder", "output", "get_attr"):
            return super().run_node(node)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        scores = {id(x): x for x in (*args, *kwargs.values()) if isinstance(x, Scores)}
        if scores:
            found = None
            if len(scores) == 1 and not kwargs:
                (current,) = scores.values()
                found = current.after(_name(node), args)
            return self._refuse(node) if found is None else found
        if not self._scalars.isdisjoint(node.all_input_nodes):
            self._scalars.add(node)
            if not self._is_lookup(node, args) and not is_pointwise_function(_name(node), len(node.all_input_nodes)):
                self._refuse(node)
        return super().run_node(node)

    def _is_lookup(self, node: fx.Node, args: Sequence[Any]) -> bool:
        """Whether the node takes one entry of a captured tensor, by indices for all its dimensions."""
        if node.target is not operator.getitem or node.args[0] in self._scalars:
            return False
        indices = args[1] if isinstance(args[1], tuple) else (args[1],)
        return len(indices) == args[0].dim() and all(isinstance(x, Tensor | int) for x in indices)

    def _refuse(self, node: fx.Node) -> Any:
        name = getattr(node.target, "__name__", node.target)
        raise CaptureError(
            describe(
                "flex_attention calls a function of one score that cannot be read for all of them at once",
                node=node,
                found=f"{name} of {', '.join(f'%{x.name}' for x in node.all_input_nodes)}",
                fix=_FIX,
            )
        )


# What functions of Python are called as ops
_NAMES = {
    **{f"__{name}__": name for name in ("eq", "ge", "gt", "le", "lt", "ne")},  # methods, in graphs of torch 2.11
    "and_": "__and__",
    "bool": "to",
    "double": "to",
    "float": "to",
    "floordiv": "floor_divide",
    "int": "to",
    "inv": "bitwise_not",
    "invert": "bitwise_not",
    "long": "to",
    "mod": "remainder",
    "multiply": "mul",
    "or_": "__or__",
    "subtract": "sub",
    "truediv": "div",
    "true_divide": "div",
    "xor": "__xor__",
}


def _name(node: fx.Node) -> str:
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return _NAMES.get(name, name)
