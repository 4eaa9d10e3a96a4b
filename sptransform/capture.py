"""Dynamo's graph to a functional, pre-dispatch ATen graph: attention, linear, embedding, losses one node each.

Tracing runs below Dynamo and above autograd and autocast, so what the user wrote is what the graph says: autocast and
grad-mode regions are nodes, dropout is dropout. Kept per node: fake value, source line, module path, recompute tags,
and whether autograd tracks it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.predispatch
from torch import fx

# Private: the fake mode Dynamo traced with. Values of another mode cannot meet its own.
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import TensorMetadata
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from sptransform import annotations
from sptransform.errors import CaptureError, describe
from sptransform.functionalize import functionalize
from sptransform.parameters import stored_in, whole
from sptransform.rewriter import rename
from sptransform.sizes import split_length

_regions = itertools.count(1)
_HOOKS = {"register_hook", "register_post_accumulate_grad_hook"}
# functorch's transforms enter and leave a level of their own; what runs there is not the graph's to see
_TRANSFORMS = {
    getattr(torch._C._functorch, f"_{name}_increment_nesting") for name in ("grad", "jvp", "vmap")
} | {fn for name, fn in vars(torch._functorch.predispatch).items() if name.startswith("_vmap_increment")}


class _Inliner(fx.Interpreter):
    """Runs a Dynamo graph; a checkpointed region runs inline, its nodes tagged as torch's own would be.

    Of selectively checkpointed regions ``policies`` gets the mode that decides, for passes/open_checkpointed.py.
    """

    def __init__(self, gm: fx.GraphModule, policies: dict[int, Any]) -> None:
        super().__init__(gm)
        self._policies = policies

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self._autocasts: list[torch.autocast] = []
        try:
            return super().run(*args, **kwargs)
        finally:
            while self._autocasts:  # an op failed inside of a region
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
            return _Inliner(body, self._policies).run(*operands)
        if target is whole:
            return args[0].tensor
        # torch's tracer notes these two calls without making them; entered as a user would, they are noted and hold
        if target is torch.amp.autocast_mode._enter_autocast:
            self._autocasts.append(torch.autocast(*args, **kwargs))
            return self._autocasts[-1].__enter__()
        if target is torch.amp.autocast_mode._exit_autocast:
            return self._autocasts.pop().__exit__(None, None, None)
        if isinstance(target, torch._ops.HigherOrderOperator) or target in _TRANSFORMS:
            raise CaptureError(
                describe(
                    "the graph cannot show what this does to gradients or control flow",
                    found=f"{target}: a custom autograd.Function, a functorch transform, or control flow as an op",
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
        self._at = n
        if n.op != "placeholder" and n.target not in (whole, torch.ops.higher_order.tag_activation_checkpoint):
            for operand in n.all_input_nodes:
                if isinstance(self.env[operand], _InParts):
                    raise CaptureError(
                        describe(
                            "a DTensor is not an input a graph can be split for",
                            node=n,
                            found=f"%{operand.name}, and not as an attribute of the module whose parameter it is",
                            fix="read parameters as module.name; pass plain tensors: x.full_tensor()",
                        )
                    )
        return super().run_node(n)


@dataclass(frozen=True)
class _InParts:
    """A parameter or input of which each rank has its part; in the graph it is whole, and a plain tensor."""

    tensor: torch.Tensor


def _policy_of(contexts: Callable[[], Any]) -> TorchDispatchMode:
    """The mode that torch.utils.checkpoint would run a region's forward in. Raises CaptureError for other contexts."""
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


def fix_sizes(gm: fx.GraphModule, num_ranks: int | None) -> None:
    """Decide for every size Dynamo left symbolic whether the graph serves all lengths ``num_ranks`` divides, or one.

    None fixes them all to their values. The guards are Dynamo's: another size is another compile, never a wrong run.
    """
    for size, is_length in _symbolic(gm):
        if num_ranks is None:
            int(size)
        elif is_length:  # a number that is an input of its own may stay open
            split_length(size, num_ranks)


def has_symbolic_sizes(gm: fx.GraphModule) -> bool:
    """Whether Dynamo left any input size open."""
    return any(not size.node.expr.is_number for size, _ in _symbolic(gm))


def _symbolic(gm: fx.GraphModule) -> Iterator[tuple[torch.SymInt, bool]]:
    """Every symbolic int among the inputs, and whether it is a tensor's size."""
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            example = node.meta.get("example_value")
            is_tensor = isinstance(example, torch.Tensor)
            for size in example.shape if is_tensor else [example]:
                if isinstance(size, torch.SymInt):
                    yield size, is_tensor


def capture(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """Return the ATen graph of ``gm`` called with ``inputs`` (real or fake tensors), one placeholder for each.

    Raises:
        CaptureError: the graph writes into a tensor in a way that has no functional form.
    """
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None and context.fake_mode is not None else FakeTensorMode()
    fakes = [_fake(x, mode, context) if isinstance(x, torch.Tensor) else x for x in inputs]
    with mode, fx.traceback.preserve_node_meta():
        inliner = _Inliner(gm, policies := {})

        def run(*args: Any) -> Any:
            pairs = zip(args, inputs, strict=True)
            return inliner.run(*(_InParts(arg) if isinstance(x, DTensor) else arg for arg, x in pairs))

        traced = make_fx(run, pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)
    annotations.give_policies(traced.graph, policies)
    for node in traced.graph.nodes:
        annotations.note(node).differentiable = _is_tracked(node.meta.get("tensor_meta"))
        picked = annotations.projection(node)
        if picked is not None and annotations.note(node).differentiable:
            annotations.note(picked[0]).differentiable = True  # ops of several outputs carry no metadata themselves
        if node.op == "get_attr" and isinstance(constant := getattr(traced, node.target), torch.Tensor):
            node.meta["val"] = mode.from_tensor(constant, static_shapes=True)
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    origins = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for node, origin, x in zip(placeholders, origins, inputs, strict=True):
        note = annotations.note(node)
        note.differentiable = isinstance(x, torch.Tensor) and x.requires_grad
        note.input_name = _input_name(origin)
        note.stored = stored_in(x) if isinstance(x, DTensor) else ()
        note.is_parameter = isinstance(x, torch.nn.Parameter)
        rename(node, note.input_name)
    functionalize(traced.graph)
    return traced


def _input_name(placeholder: fx.Node) -> str:
    """What the user calls an input of Dynamo's graph: ``input_ids``, ``model.layers.0.mlp.up_proj.weight``."""
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    if source is None:
        return placeholder.name
    name = source.name() if callable(source.name) else source.name
    keys = [a or b for a, b in re.findall(r"\['([^']+)'\]|\[(\d+)\]", name)]
    if "_parameters" in name or "_buffers" in name:
        return ".".join(re.findall(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", name))
    # keyword arguments arrive in a dict whose own name nobody chose
    return ".".join(keys[1:] if len(keys) > 1 and not keys[1].isdigit() else keys) or placeholder.name


def _fake(x: torch.Tensor, mode: FakeTensorMode, context: TracingContext | None) -> torch.Tensor:
    """A fake of ``x`` with the symbols Dynamo gave its sizes, or none."""
    if isinstance(x, DTensor):  # in the graph whole
        with mode:
            fake = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            return fake.requires_grad_(x.requires_grad)
    symbols = None if context is None else context.tensor_to_context.get(x)
    if symbols is None:
        return mode.from_tensor(x, static_shapes=True)
    return mode.from_tensor(x, symbolic_context=symbols, source=symbols.tensor_source)


def _is_tracked(meta: Any) -> bool:
    """Whether autograd tracked a node's output, or any of its outputs, while it was traced."""
    if isinstance(meta, TensorMetadata):
        return meta.requires_grad
    return isinstance(meta, tuple | list) and any(map(_is_tracked, meta))

