"""The forward and the backward that AOTAutograd makes of a rewritten graph: what an inner backend would compile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock, get_ident
from typing import Any
from unittest.mock import patch

import torch
from functorch.compile import aot_module_simplified, min_cut_rematerialization_partition
from torch import fx

# Private: AOTAutograd reads the fake mode of what it traces from here, as Dynamo sets it for every backend
from torch._guards import TracingContext, tracing

from sptransform.compiler.rewrite import Rewritten
from sptransform.cost.groups import as_rank, groups_of
from sptransform.graph import dataflow, notes

_PATCHED = RLock()  # one thread at a time: each puts back what it found


@dataclass(frozen=True)
class TrainingGraphs:
    """The graphs of one training step.

    Attributes:
        forward: its placeholders are those of the rewritten graph; it returns its outputs, then what is saved.
        backward: its placeholders are saved values, by their names in ``forward``, and gradients of outputs. None where
            nothing is trained.
    """

    forward: fx.Graph
    backward: fx.Graph | None


def training_graphs(rewritten: Rewritten) -> TrainingGraphs:
    """Trace the backward of a rewritten graph. Nothing is computed, and no process group is needed.

    What is saved is chosen as the inner backends of torch choose it, by the smallest cut; what the graph says is
    computed again, is.
    """
    gm = rewritten.graph_module
    placeholders = gm.graph.find_nodes(op="placeholder")
    mode = dataflow.fake_mode(gm.graph)
    with mode:
        inputs = [_input(node) for node in placeholders]
    found: list[fx.Graph] = []

    def partition(joint: fx.GraphModule, args: Any, **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        parts = min_cut_rematerialization_partition(joint, args, **options)
        found[:] = [part.graph for part in parts]
        return parts

    def keep(traced: fx.GraphModule, args: Any) -> Any:
        if not found:
            found.append(traced.graph)
        return traced

    with tracing(TracingContext(mode)), as_rank(rewritten.context.mesh.rank, groups_of(rewritten)), without_code():
        aot_module_simplified(gm, inputs, fw_compiler=keep, bw_compiler=keep, partition_fn=partition)
    for graph in found:
        _call_drawing_ops_directly(graph)
    return TrainingGraphs(found[0], found[1] if len(found) > 1 else None)


@contextmanager
def without_code() -> Iterator[None]:
    """Within, new graph modules get no Python code, which takes a tenth of the time; one that is called is interpreted.

    torch writes the code of every graph on the way to the last one, to run it and to log it. Other threads get theirs.
    """
    with _PATCHED:
        thread, write, show = get_ident(), fx.GraphModule.recompile, fx.GraphModule.print_readable

        def recompile(gm: fx.GraphModule) -> Any:
            return None if get_ident() == thread else write(gm)

        def print_readable(gm: fx.GraphModule, *args: Any, **options: Any) -> str:
            return "" if get_ident() == thread else show(gm, *args, **options)

        with (
            patch.object(fx.GraphModule, "recompile", recompile),
            patch.object(fx.GraphModule, "forward", lambda gm, *args: fx.Interpreter(gm).run(*args)),
            patch.object(fx.GraphModule, "print_readable", print_readable),
        ):
            yield


def _call_drawing_ops_directly(graph: fx.Graph) -> None:
    """Replace what saves or restores the generator around an op that is computed again by the op itself.

    Nothing runs here, and a state is small.
    """
    for node in list(graph.nodes):
        name = node.target.name() if hasattr(node.target, "name") else ""
        if name == "run_and_save_rng_state":
            of_state, of_result = sorted(node.users, key=lambda user: user.args[1])
            with graph.inserting_before(node):
                kept = graph.call_function(torch.ops.aten.empty.memory_format, ([0],))
            kept.meta = {**of_state.meta, "val": torch.empty(0)}
            of_state.replace_all_uses_with(kept)
            of_result.replace_all_uses_with(_called(node, of_result.meta, *node.args))
            for gone in (of_state, of_result, node):
                graph.erase_node(gone)
        elif name == "run_with_rng_state":
            of_users = next((user.meta for user in node.users), {})
            node.replace_all_uses_with(_called(node, {**of_users, **node.meta}, *node.args[1:]))
            graph.erase_node(node)


def _called(node: fx.Node, meta: dict[str, Any], op: Any, *args: Any) -> fx.Node:
    """A call of ``op`` before ``node``, with its keywords; ``meta`` says where in the user's code it is."""
    with node.graph.inserting_before(node):
        called = node.graph.call_function(op, args, node.kwargs)
    values, keywords = fx.map_arg((args, dict(node.kwargs)), dataflow.value)
    called.meta = {**meta, "val": op(*values, **keywords)}
    return called


def _input(placeholder: fx.Node) -> Any:
    value = dataflow.value(placeholder)
    if isinstance(value, torch.Tensor) and notes.note(placeholder).differentiable:
        return torch.empty_like(value).requires_grad_()
    return value
