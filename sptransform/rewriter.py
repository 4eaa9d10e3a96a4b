"""Edits of a graph: one use edge at a time, with what is known of a node carried over. Knows no op."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import sympy
import torch
from torch import fx

# Private: as torch traces; without it some ops of torch 2.11 (a linear) ask for the number behind an open size
from torch._dispatch.python import enable_python_dispatcher
from torch.utils.checkpoint import CheckpointPolicy

from sptransform import annotations
from sptransform.placement import Placement, R, Shard
from sptransform.rules import map_nodes
from sptransform.sizes import node_of


def redistribute(xs: list[Any], transitions: tuple[tuple[Placement, Placement], ...]) -> list[Any]:
    """Marks a change of placement of one or more tensors; lowered to collectives, never run."""
    raise AssertionError("a redistribute node was left in the graph")


def is_redistribute(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is redistribute


def is_gather(node: fx.Node) -> bool:
    """Whether all that the node, lowered or not, moves is gathered from shards to R."""
    changes = annotations.note(node).transitions
    return bool(changes) and all(isinstance(source, Shard) and target == R for source, target in changes)


def rename(node: fx.Node, name: str) -> None:
    """Call the node ``name``, made a legal and unused one."""
    # Private: assigning ``node.name`` would let two nodes share one
    node._rename(re.sub(r"\W", "_", name))
    if node.op == "placeholder":
        node.target = node.name


def succeed(old: fx.Node, new: fx.Node) -> None:
    """Let ``new`` take the place, the readers and the name of ``old``."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
    new.name = old.name


def replace_operand(node: fx.Node, index: int, new: fx.Node) -> None:
    """Let the node read ``new`` as its ``index``-th tensor; the old producer's other uses stay."""
    count = -1

    def visit(x: Any) -> Any:
        nonlocal count
        if isinstance(x, fx.Node) and annotations.is_tensor(x):
            count += 1
            return new if count == index else x
        return x

    args, kwargs = map_nodes((node.args, dict(node.kwargs)), visit)
    node.args, node.kwargs = args, kwargs


def insert_redistribute(
    before: fx.Node, sources: Sequence[fx.Node], transitions: Sequence[tuple[Placement, Placement]]
) -> list[fx.Node]:
    """Add one redistribute node in front of ``before``; return one node per moved tensor."""
    graph = before.graph
    with graph.inserting_before(before):
        node = graph.call_function(redistribute, (list(sources), tuple(transitions)))
        outputs = [graph.call_function(operator.getitem, (node, i)) for i in range(len(sources))]
    node.meta["val"] = [annotations.value(source) for source in sources]
    note = annotations.note(node)
    note.transitions = tuple(transitions)
    note.placements = tuple(target for _, target in transitions)
    note.differentiable = any(annotations.note(source).differentiable for source in sources)
    annotations.copy(before if before.op == "call_function" else sources[0], node)
    for output, source, (_, target) in zip(outputs, sources, transitions, strict=True):
        rename(output, f"{source.name}_{target}".rstrip(")"))
        output.meta["val"] = annotations.value(source)
        annotations.note(output).differentiable = annotations.note(source).differentiable
        annotations.copy(node, output)
    return outputs


def fake_arguments(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The node's arguments, with their fake values for the nodes among them."""
    return map_nodes((node.args, dict(node.kwargs)), lambda x: annotations.value(x) if isinstance(x, fx.Node) else x)


def compute_value(node: fx.Node) -> None:
    """Set the node's fake value by running it on those of its arguments."""
    args, kwargs = fake_arguments(node)
    sizes = (size for x in node.all_input_nodes for value in annotations.values(x) for size in value.shape)
    is_open = any(isinstance(size, torch.SymInt) for size in sizes)
    with enable_python_dispatcher() if is_open else nullcontext():
        node.meta["val"] = node.target(*args, **kwargs)


def emitter(before: fx.Node) -> Callable[..., fx.Node]:
    """``emit(target, args, kwargs)`` that adds a node in front of ``before``, in its name, with its fake value."""

    def emit(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        args, kwargs = map_nodes(
            (args, kwargs), lambda x: node_of(x, before) if isinstance(x, sympy.Expr) else x
        )
        with before.graph.inserting_before(before):
            node = before.graph.call_function(target, args, kwargs)
        annotations.copy(before, node)
        compute_value(node)
        annotations.note(node).differentiable = any(annotations.note(x).differentiable for x in node.all_input_nodes)
        return node

    return emit


def emit_like(before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Add a node in front of ``before`` in its name, outside any fake mode."""
    with annotations.values(before)[0].fake_mode, torch.no_grad(), annotations.region_of(before).autocast():
        return emitter(before)(target, args, kwargs)


def keep_result(node: fx.Node) -> None:
    """In a checkpointed region, save what the node gives: recomputing it would communicate again."""
    if "recompute" in node.meta:
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
