"""Dynamo's graph to a functional, pre-dispatch ATen graph: attention, linear, embedding, losses are one node each.

Tracing runs below Dynamo and above autograd and autocast, so the graph says what the user wrote: autocast and grad-mode
regions are nodes, dropout is a dropout op. Each node keeps its fake value, source line, module path and recompute tags,
and whether autograd tracks it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx

# Private API: the fake mode Dynamo traced with. Fake tensors of different modes cannot be mixed.
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import TensorMetadata

from sptransform.capture.checks_on_data import check_tensors
from sptransform.capture.functionalize import functionalize
from sptransform.capture.interpreter import Inliner, InParts
from sptransform.capture.norms import open_norms
from sptransform.capture.picked_rows import spread_picked_rows
from sptransform.diagnostics.errors import CaptureError, describe
from sptransform.graph import dataflow, notes
from sptransform.graph.edit import rename
from sptransform.graph.regions import Region
from sptransform.parameters.parts import stored_in


def capture(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """Return the ATen graph of ``gm`` called with ``inputs`` (real or fake tensors), one placeholder for each.

    Raises:
        CaptureError: the graph writes into a tensor in a way that has no functional form.
    """
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None and context.fake_mode is not None else FakeTensorMode()
    fakes = [_fake(x, mode, context) if isinstance(x, torch.Tensor) else x for x in inputs]
    with mode, _symbols_of_its_own(mode), fx.traceback.preserve_node_meta():
        inliner = Inliner(gm, policies := {})

        def run(*args: Any) -> Any:
            pairs = zip(args, inputs, strict=True)
            return inliner.run(*(InParts(arg) if isinstance(x, DTensor) else arg for arg, x in pairs))

        traced = make_fx(run, pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)
    notes.give_policies(traced.graph, policies)
    for node in traced.graph.nodes:
        notes.note(node).differentiable = _is_tracked(node.meta.get("tensor_meta"))
        picked = dataflow.projection(node)
        if picked is not None and notes.note(node).differentiable:
            notes.note(picked[0]).differentiable = True  # ops with several outputs have no metadata of their own
        if node.op == "get_attr" and isinstance(constant := getattr(traced, node.target), torch.Tensor):
            if isinstance(constant, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(constant):
                raise _untraced(node)
            node.meta["val"] = mode.from_tensor(constant, static_shapes=True)
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    origins = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for node, origin, x in zip(placeholders, origins, inputs, strict=True):
        note = notes.note(node)
        note.differentiable = isinstance(x, torch.Tensor) and x.requires_grad
        note.input_name = _input_name(origin)
        note.stored = stored_in(x) if isinstance(x, DTensor) else ()
        note.is_parameter = isinstance(x, torch.nn.Parameter)
        note.is_buffer = "_buffers[" in _source(origin)
        rename(node, note.input_name)
    # Dynamo calls backends in the grad mode that the user's call is in
    notes.set_region_around(traced.graph, Region(grad_enabled=torch.is_grad_enabled()))
    open_norms(traced.graph)
    functionalize(traced.graph)
    with _symbols_of_its_own(mode):
        spread_picked_rows(traced.graph)
        check_tensors(traced.graph)
    return traced


def _untraced(node: fx.Node) -> CaptureError:
    return CaptureError(
        describe(
            "the model makes a tensor in a way that no graph shows",
            node=next(iter(node.users), node),
            found="an operand that torch's tracer takes for a constant",
            fix="make it with torch ops: x.detach() for what has no gradient",
        )
    )


def _symbols_of_its_own(mode: FakeTensorMode) -> AbstractContextManager[None]:
    """Inside, numbers that are data get symbols that Dynamo knows nothing of; no graph has them in the end."""
    return nullcontext() if mode.shape_env is None else mode.shape_env.ignore_fresh_unbacked_symbols()


def _input_name(placeholder: fx.Node) -> str:
    """What the user calls an input of Dynamo's graph: ``input_ids``, ``model.layers.0.mlp.up_proj.weight``."""
    name = _source(placeholder)
    keys = [a or b for a, b in re.findall(r"\['([^']+)'\]|\[(\d+)\]", name)]
    if "_parameters" in name or "_buffers" in name:
        return ".".join(re.findall(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", name))
    # keyword arguments arrive in a dict; the user did not choose its name
    return ".".join(keys[1:] if len(keys) > 1 and not keys[1].isdigit() else keys) or placeholder.name


def _source(placeholder: fx.Node) -> str:
    """How Dynamo reaches an input: ``L['self']._modules['head']._parameters['weight']``; empty if it does not say."""
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    return "" if source is None else source.name


def _fake(x: torch.Tensor, mode: FakeTensorMode, context: TracingContext | None) -> torch.Tensor:
    """A fake of ``x`` with Dynamo's symbols for its sizes; static if there are none."""
    if isinstance(x, DTensor):  # the graph sees the full tensor
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
