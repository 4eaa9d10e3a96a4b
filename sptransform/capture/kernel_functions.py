"""Custom autograd.Functions around an attention kernel: the kernel's op takes the place of the function.

flash-attn calls its kernels in an ``autograd.Function``, of which Dynamo makes one node with a forward and a backward
graph::

    %apply = autograd_function_apply(%forward, %backward, %q, %k, %v)

Where the forward does nothing but call one kernel of ``op_rules/attention_kernels.py``, around which entries are
only moved or padded, and the backward nothing but call that kernel's gradient with the same arguments, and give each
operand its own, the function is attention, and its gradient that of attention. The forward then runs inline, and the
passes see the op. Any other function stays refused.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import fx

from sptransform.graph.calls import arguments_of
from sptransform.op_rules.attention_kernels import (
    ALLOCATING,
    AROUND_KERNELS,
    DETACHING_METHODS,
    GRAD_MODE,
    PADDING,
    Kernel,
    kernel_of,
    op_name,
)


def is_kernel_function(forward: fx.GraphModule, backward: fx.GraphModule) -> bool:
    """Whether the function with these graphs is a call of one kernel, and its gradient."""
    calls, derivatives = _computing(forward), _computing(backward)
    if len(calls) != 1 or len(derivatives) != 1:
        return False
    kernel = kernel_of(calls[0].target)
    if kernel is None or op_name(derivatives[0].target) != kernel.gradient:
        return False
    given, taken = (arguments_of(node)[0] for node in (calls[0], derivatives[0]))
    results, saved = forward.graph.output_node().args[0]
    placeholders = backward.graph.find_nodes(op="placeholder")  # the gradients of the results, and what was saved
    if len(placeholders) != len(results) + len(saved):
        return False
    of_saved = dict(zip(placeholders[len(results) :], saved, strict=True))
    source, parts = _origin(results[0])
    return (
        (source, parts[-1:]) == (calls[0], [0])
        and all(map(_is_cut, parts[:-1]))
        and _origin(taken["dout"]) in ((placeholders[0], []), (placeholders[0], [_PAD]))
        and all(_saved(taken[name], of_saved) == (calls[0], [i]) for i, name in enumerate(("out", "softmax_lse")))
        and _is_same_call(kernel, given, taken, of_saved)
        and _gives_each_its_own(kernel, given, taken, forward, backward)
    )


def _is_same_call(
    kernel: Kernel, given: Mapping[str, Any], taken: Mapping[str, Any], of_saved: Mapping[fx.Node, Any]
) -> bool:
    """Whether the gradient is that of the forward's call: its arguments ``taken`` are those that were ``given``."""
    for name in kernel.meaning:
        theirs = kernel.in_gradient.get(name, name)
        if theirs not in taken:
            return False
        mine, other = given[name], taken[theirs]
        if isinstance(other, fx.Node):
            if not isinstance(mine, fx.Node) or _saved(other, of_saved) != _origin(mine):
                return False
        elif mine != other:
            return False
    return True


def _saved(node: Any, of_saved: Mapping[fx.Node, Any]) -> tuple[fx.Node, list[Any]] | None:
    """The origin in the forward of what a node of the backward is; None if it was not saved there as it is."""
    source, parts = _origin(node) if isinstance(node, fx.Node) else (None, [])
    saved = of_saved.get(source)
    return _origin(saved) if isinstance(saved, fx.Node) and not parts else None


def _gives_each_its_own(
    kernel: Kernel,
    given: Mapping[str, Any],
    taken: Mapping[str, Any],
    forward: fx.GraphModule,
    backward: fx.GraphModule,
) -> bool:
    """Whether each operand that has a gradient gets what the kernel wrote for the queries, keys or values it is."""
    (gradients,) = backward.graph.output_node().args
    names = kernel.query, kernel.key, kernel.value
    origins = {name: _origin(given[name]) for name in names}
    written = {name: _origin(taken[f"d{name}"]) for name in names}
    if any(written[a] == written[b] for a, b in combinations(names, 2)):
        return False
    for operand, gradient in zip(forward.graph.find_nodes(op="placeholder"), gradients, strict=True):
        example = operand.meta["example_value"]
        if not isinstance(example, torch.Tensor) or not example.requires_grad:
            continue
        found, parts = _origin(gradient) if isinstance(gradient, fx.Node) else (None, [])
        own = {name: part for name, (source, part) in origins.items() if source is operand}
        if not own or not all(map(_is_cut, parts)):
            return False
        if any(written[name] != (found, [x for x in part if x != _PAD]) for name, part in own.items()):
            return False
    return True


def _computing(gm: fx.GraphModule) -> list[fx.Node]:
    """The graph's calls, but for what only moves entries."""
    calls = [node for node in gm.graph.nodes if node.op in ("call_function", "call_method", "call_module")]
    return [node for node in calls if node.target not in AROUND_KERNELS]


_PAD = "padded"


def _origin(node: fx.Node) -> tuple[fx.Node, list[Any]]:
    """What the node is, or is a part of, before it was moved; and which parts were taken of it, or where it was padded.

    The last step comes first.
    """
    parts = []
    while node.op != "placeholder" and node.target in AROUND_KERNELS and node.target not in ALLOCATING:
        if node.target is operator.getitem:
            parts.append(node.args[1])
        elif node.target in PADDING:
            parts.append(_PAD)
        node = node.args[0]
    return node, parts


def _is_cut(part: Any) -> bool:
    """Whether the part is the first entries of the last dimension, which drops what it was padded by."""
    if not isinstance(part, tuple) or len(part) != 2 or part[0] is not Ellipsis or not isinstance(part[1], slice):
        return False
    return part[1].start is None and part[1].step is None


class KernelFunction(fx.Interpreter):
    """Runs such a forward as if it stood where the function is called: tensors keep their gradients."""

    def at(self, call: fx.Node, operands: Sequence[Any]) -> Any:
        """What the function returns where ``call`` calls it, without what it saves for its backward."""
        for node in self.module.graph.nodes:  # in a checkpointed region, they are of that region
            node.meta |= {key: call.meta[key] for key in ("recompute", "ac_graph_id") if key in call.meta}
        results, _ = self.run(*operands)
        return results

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return None if target in GRAD_MODE else super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[0] if target in DETACHING_METHODS else super().call_method(target, args, kwargs)
