"""In-place ops of a captured graph as out-of-place ones.

Done on the graph, after tracing: torch's own functionalization runs below autocast and would lose those regions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sptransform import annotations
from sptransform.errors import CaptureError, describe

aten = torch.ops.aten

# a view -> the op that writes a new part back into its base
_SCATTERS = {aten.select.int: aten.select_scatter.default, aten.slice.Tensor: aten.slice_scatter.default}


def functionalize(graph: fx.Graph) -> None:
    """Rewrite ``graph`` in place; a write into an input (a buffer) becomes one ``copy_`` at the end.

    Raises:
        CaptureError: an op writes through a view that cannot be written back, naming op and user line.
    """
    if any(_is_write(node) for node in graph.nodes):
        _Functionalizer(graph).run()


def _is_write(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


class _Functionalizer:
    """Walks the graph once; ``current[n]`` is the node that holds n's value as of now."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.current: dict[fx.Node, fx.Node] = {}
        self.base: dict[fx.Node, fx.Node] = {}  # view -> what it is a view of
        self.version: dict[fx.Node, int] = {}  # root -> number of writes so far
        self.seen: dict[fx.Node, int] = {}  # view -> writes of its root it reflects

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "output":
                self._write_back_inputs(node)
            node.args = fx.map_arg(node.args, lambda x, at=node: self._read(x, at))
            node.kwargs = fx.map_arg(node.kwargs, lambda x, at=node: self._read(x, at))
            if _is_write(node) and not (node.target is aten.copy_.default and node.meta.get("write_back")):
                self._write(node)
            else:
                self._note_alias(node)

    def _root(self, node: fx.Node) -> fx.Node:
        while node in self.base:
            node = self.base[node]
        return node

    def _note_alias(self, node: fx.Node) -> None:
        value = annotations.value(node)
        if not isinstance(value, torch.Tensor) or node.op != "call_function":
            return
        storage = value.untyped_storage()._cdata
        for source in node.all_input_nodes:
            if annotations.is_tensor(source) and annotations.value(source).untyped_storage()._cdata == storage:
                origin = self._origin(source)
                self.base[node] = origin
                self.seen[node] = self.version.get(self._root(origin), 0)
                return

    def _origin(self, node: fx.Node) -> fx.Node:
        """The original node whose current value ``node`` is."""
        return next((old for old, new in self.current.items() if new is node), node)

    def _read(self, node: fx.Node, at: fx.Node) -> fx.Node:
        """The node to read for ``node`` now: its newest value, views taken anew if their base was written."""
        node = self._origin(node)
        if node in self.base:
            root = self._root(node)
            if self.seen.get(node, 0) != self.version.get(root, 0):
                source = self._read(self.base[node], at)
                with self.graph.inserting_before(at):
                    fresh = self.graph.node_copy(node, lambda x: source if x is node.all_input_nodes[0] else x)
                fresh.meta = dict(node.meta)
                self.current[node] = fresh
                self.seen[node] = self.version[root]
        return self.current.get(node, node)

    def _write(self, node: fx.Node) -> None:
        functional = _functional_form(node)
        target = self._origin(node.args[0])
        with self.graph.inserting_before(node):
            new = self.graph.call_function(functional, node.args, node.kwargs)
        new.meta = dict(node.meta)
        self._set(target, new, node)
        node.replace_all_uses_with(target)
        self.graph.erase_node(node)

    def _set(self, target: fx.Node, new: fx.Node, at: fx.Node) -> None:
        root = self._root(target)
        self.version[root] = self.version.get(root, 0) + 1
        while target is not root:
            self.current[target], self.seen[target] = new, self.version[root]
            scatter = _SCATTERS.get(target.target)
            base = self.base[target]
            if scatter is None and annotations.shape(target) != annotations.shape(base):
                raise CaptureError(
                    describe(
                        "an op writes into a view, and this view cannot be written back out of place",
                        node=at,
                        found=f"a view made by {target.target}",
                        fix="write out of place there, or into the tensor itself",
                    )
                )
            if scatter is not None:
                with self.graph.inserting_before(at):
                    whole = self.graph.call_function(scatter, (self._read(base, at), new, *target.args[1:]))
                whole.meta = dict(at.meta)
                whole.meta["val"] = annotations.value(base)
                new = whole
            target = base
        self.current[root] = new

    def _write_back_inputs(self, output: fx.Node) -> None:
        for node in [n for n in self.graph.nodes if n.op == "placeholder" and self.version.get(n)]:
            with self.graph.inserting_before(output):
                copy = self.graph.call_function(aten.copy_.default, (node, self.current[node]))
            copy.meta["val"] = annotations.value(node)


def _functional_form(node: fx.Node) -> Any:
    """The overload without the trailing underscore. Raises CaptureError where there is none."""
    name = node.target._schema.name.split("::")[1]
    packet = getattr(aten, name.rstrip("_"), None) if name.endswith("_") else None
    overload = getattr(packet, node.target._overloadname, None) if packet is not None else None
    if overload is None:
        raise CaptureError(
            describe("an op writes in place and has no out-of-place form", node=node, fix="write out of place there")
        )
    return overload
