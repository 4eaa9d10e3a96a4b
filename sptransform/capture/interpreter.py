"""Runs Dynamo's graph for tracing: inlines checkpointed regions and calls of attention kernels, and refuses ops that a
trace would lose."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from sptransform.capture import autograd_functions, flex_attention
from sptransform.capture.block_masks import FLEX, only_for_blocks
from sptransform.capture.kernel_functions import KernelFunction, is_kernel_function
from sptransform.capture.transformed import LOADING, transformed
from sptransform.diagnostics.errors import CaptureError, describe
from sptransform.parameters.parts import full_tensor

_regions = itertools.count(1)
_HOOKS = {"register_hook", "register_post_accumulate_grad_hook"}


class Inliner(fx.Interpreter):
    """Runs a Dynamo graph; a checkpointed region runs inline, its nodes tagged as torch's own would be.

    For each selectively checkpointed region, ``policies`` gets the mode that decides what to save; the pass
    DecomposeCheckpointed uses it.
    """

    def __init__(self, gm: fx.GraphModule, policies: dict[int, Any]) -> None:
        super().__init__(gm)
        self._policies = policies
        self._unread = only_for_blocks(gm.graph)
        self._transformed = transformed(gm.graph)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self._autocasts: list[torch.autocast] = []
        try:
            return super().run(*args, **kwargs)
        finally:
            while self._autocasts:  # an op failed inside an autocast region
                self._autocasts.pop().__exit__(None, None, None)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.higher_order.tag_activation_checkpoint:
            body, *operands = args
            region = next(_regions)
            for node in body.graph.nodes:
                node.meta.setdefault("recompute", CheckpointPolicy.PREFER_RECOMPUTE)
                node.meta["ac_graph_id"] = region
            if (contexts := body.meta.get("_checkpoint_context_fn")) is not None:
                self._policies[region] = _policy_of(contexts)
            return Inliner(body, self._policies).run(*operands)
        if target is torch.ops.higher_order.autograd_function_apply:
            if is_kernel_function(*args[:2]):
                return KernelFunction(args[0]).at(self._at, args[2:])
            return autograd_functions.applied(self._at, args, kwargs)
        if target is FLEX:
            return flex_attention.attended(self._at, args)
        if target is full_tensor:
            return args[0].tensor
        if target is torch._C._autograd._get_data_attr:  # torch's tracer would take x.data for a constant
            return args[0].detach()
        # torch's tracer would record these two calls but not run them; torch.autocast is recorded and also takes effect
        if target is torch.amp.autocast_mode._enter_autocast:
            self._autocasts.append(torch.autocast(*args, **kwargs))
            return self._autocasts[-1].__enter__()
        if target is torch.amp.autocast_mode._exit_autocast:
            return self._autocasts.pop().__exit__(None, None, None)
        if isinstance(target, torch._ops.HigherOrderOperator):
            raise CaptureError(
                describe(
                    "the graph cannot show what this does to gradients or control flow",
                    found=f"{target}: control flow, or a kernel, as an op",
                    node=self._at,
                    fix="write it with torch ops, or register it as an op with torch.library and register_autograd",
                )
            )
        return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in _HOOKS:
            raise CaptureError(
                describe(
                    "a hook on a tensor is no part of the graph, and would be lost",
                    found=f"Tensor.{target} in a forward",
                    node=self._at,
                    fix="write what the hook does as an op, or register it on a parameter outside of the forward",
                )
            )
        return super().call_method(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        if n in self._unread or n.target is LOADING:
            return None
        self._at = n
        part = self._transformed.get(n)
        if n.op != "placeholder" and n.target not in (full_tensor, torch.ops.higher_order.tag_activation_checkpoint):
            for operand in n.all_input_nodes if part is None else part.inputs:
                if isinstance(self.env[operand], InParts):
                    raise CaptureError(
                        describe(
                            "a DTensor is not an input a graph can be split for",
                            node=n,
                            found=f"%{operand.name}, and not as an attribute of the module whose parameter it is",
                            fix="read parameters as module.name; pass plain tensors: x.full_tensor()",
                        )
                    )
        if part is not None:
            results = part.run(self.module, [self.env[x] for x in part.inputs])
            self.env |= dict.fromkeys(part.nodes) | dict(zip(part.outputs, results, strict=True))
            return self.env[n]  # the interpreter leaves out nodes that have a value
        return super().run_node(n)


@dataclass(frozen=True)
class InParts:
    """A sharded parameter or input; in the graph it is a full, plain tensor."""

    tensor: torch.Tensor


def _policy_of(contexts: Callable[[], Any]) -> TorchDispatchMode:
    """The mode in which torch.utils.checkpoint runs a region's forward. Raises CaptureError for other contexts."""
    forward, _ = contexts()
    if not isinstance(forward, TorchDispatchMode):
        raise CaptureError(
            describe(
                "checkpoint's context_fn gives contexts that say nothing of what to save",
                found=type(forward).__name__,
                fix="torch.utils.checkpoint.create_selective_checkpoint_contexts",
            )
        )
    return forward
