"""Graph edits, one use edge at a time; a node's metadata is carried over. Op-agnostic."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import Any

import sympy
import torch
from torch import fx

# Private: torch's own tracing uses it. Without it some ops of torch 2.11 (linear) need the value of a symbolic size.
from torch._dispatch.python import enable_python_dispatcher

from sptransform.diagnostics.errors import RuleError
from sptransform.graph import dataflow, notes
from sptransform.rules.rule import map_nodes
from sptransform.sharding.sizes import SymbolicSizeError, lengths_of


def rename(node: fx.Node, name: str) -> None:
    """Rename the node to ``name``, changed to a legal and unused name if necessary."""
    # Private: assigning ``node.name`` would let two nodes share a name
    node._rename(re.sub(r"\W", "_", name))
    if node.op == "placeholder":
        node.target = node.name


def succeed(old: fx.Node, new: fx.Node) -> None:
    """Replace ``old`` by ``new``, which takes over its users and its name."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
    new.name = old.name


def succeed_outputs(old: fx.Node, new: Sequence[fx.Node]) -> None:
    """Replace ``old``, whose users each pick one of its outputs, by one node for each output."""
    for user in list(old.users):
        _, index = dataflow.projection(user)
        succeed(user, new[index])
    old.graph.erase_node(old)


def replace_operand(node: fx.Node, index: int, new: fx.Node) -> None:
    """Let the node read ``new`` as its ``index``-th tensor; other uses of the old producer stay."""
    indices = count()
    node.args, node.kwargs = dataflow.map_operands(node, lambda x: new if next(indices) == index else x)


def fake_arguments(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The node's arguments, with nodes replaced by their fake values."""
    return map_nodes((node.args, dict(node.kwargs)), lambda x: dataflow.value(x) if isinstance(x, fx.Node) else x)


@contextmanager
def _as_at(node: fx.Node) -> Iterator[None]:
    """Run ops on fakes, without gradients, in the autocast region of ``node``."""
    with dataflow.fake_mode(node.graph), torch.no_grad(), notes.region_of(node).autocast():
        yield


def fresh_value(node: fx.Node) -> Any:
    """What the node's op gives on the fake values of its arguments. The caller needs no fake mode."""
    with _as_at(node):
        return _computed(node)


def compute_value(node: fx.Node) -> None:
    """Set the node's fake value by running its op on the fake values of its arguments."""
    node.meta["val"] = _computed(node)


def _computed(node: fx.Node) -> Any:
    args, kwargs = fake_arguments(node)
    sizes = (size for x in node.all_input_nodes for value in dataflow.values(x) for size in value.shape)
    is_open = any(isinstance(size, torch.SymInt) for size in sizes)
    with enable_python_dispatcher() if is_open else nullcontext():
        return node.target(*args, **kwargs)


def emitter(before: fx.Node) -> Callable[..., fx.Node]:
    """``emit(target, args, kwargs)``, which adds a node in front of ``before`` with its metadata and a fake value."""

    def emit(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        args, kwargs = map_nodes(
            (args, kwargs), lambda x: node_of(x, before) if isinstance(x, sympy.Expr) else x
        )
        with before.graph.inserting_before(before):
            node = before.graph.call_function(target, args, kwargs)
        notes.copy(before, node)
        compute_value(node)
        notes.derive_differentiable(node)
        return node

    return emit


def emit_like(before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Add a node that calls ``target`` in front of ``before``, with its source line, a fake value and a note.

    Arguments may be nodes, and lists of them. The caller needs no fake mode.
    """
    if not dataflow.is_op(target) and target is not operator.getitem:
        raise RuleError(f"a node calls an overload, as torch.ops.aten.silu.default, not {target!r}")
    with _as_at(before):
        return emitter(before)(target, args, kwargs)


def node_of(size: sympy.Expr, before: fx.Node) -> fx.Node:
    """Add nodes in front of ``before`` that compute a symbolic size from the graph's symbolic inputs."""
    graph = before.graph

    def call(target: Any, *args: Any) -> fx.Node:
        with graph.inserting_before(before):
            node = graph.call_function(target, args)
        node.meta["val"] = target(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args))
        return node

    def build(expression: sympy.Expr) -> Any:
        if expression.is_Integer:
            return int(expression)
        if expression.is_Symbol:
            source, factor = _length_of(expression, graph)
            return call(operator.floordiv, source, factor)
        if isinstance(expression, sympy.Add | sympy.Mul):
            target = operator.add if isinstance(expression, sympy.Add) else operator.mul
            first, *rest = map(build, expression.args)
            for term in rest:
                first = call(target, first, term)
            return first
        raise SymbolicSizeError(f"cannot compute {expression} in the graph")

    return build(size)


def _length_of(local: sympy.Symbol, graph: fx.Graph) -> tuple[fx.Node, int]:
    """(input, num_ranks) such that ``local`` is one rank's share of the input."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, torch.SymInt):
            whole = lengths_of(value).get(value.node.expr)
            if whole is not None and local in whole.free_symbols:
                return node, int(whole / local)
    raise SymbolicSizeError(f"no input of the graph is the length behind {local}")
