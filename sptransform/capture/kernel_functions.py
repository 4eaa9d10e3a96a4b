"""Custom autograd.Functions around an attention kernel: the kernel's op takes the place of the function.

flash-attn calls its kernels in an ``autograd.Function``, of which Dynamo makes one node with a forward and a backward
graph::

    %apply = autograd_function_apply(%forward, %backward, %q, %k, %v)

Where the forward does nothing but call one kernel of ``op_rules/attention_kernels.py``, around which entries are
only moved or padded, and the backward nothing but call that kernel's gradient, and give one to each operand that has
one, the function is attention, and its gradient that of attention. The forward then runs inline, and the passes see the
op. Any other function stays refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from sptransform.op_rules.attention_kernels import AROUND_KERNELS, DETACHING_METHODS, GRAD_MODE, kernel_of, op_name


def is_kernel_function(forward: fx.GraphModule, backward: fx.GraphModule) -> bool:
    """Whether the function with these graphs is a call of one kernel, and its gradient."""
    kernels = [kernel_of(target) for target in _computing(forward)]
    if len(kernels) != 1 or kernels[0] is None:
        return False
    if [op_name(target) for target in _computing(backward)] != [kernels[0].gradient]:
        return False
    operands = [node.meta["example_value"] for node in forward.graph.find_nodes(op="placeholder")]
    (gradients,) = backward.graph.output_node().args
    pairs = zip(operands, gradients, strict=True)
    return all(found is not None for x, found in pairs if isinstance(x, torch.Tensor) and x.requires_grad)


def _computing(gm: fx.GraphModule) -> list[Any]:
    """What the graph calls, but for what only moves entries."""
    calls = [node.target for node in gm.graph.nodes if node.op in ("call_function", "call_method", "call_module")]
    return [target for target in calls if target not in AROUND_KERNELS]


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
